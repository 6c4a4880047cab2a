//! A TCP relay that behaves like a bad link: what it passes on arrives late, and now and then very late.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;

/// How long a lost packet delays what follows it, as the sender's retransmission does.
const RETRANSMISSION: Duration = Duration::from_millis(300);

/// A relay to one address; it ends when dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    stopping: Arc<AtomicBool>,
}

impl Relay {
    /// Passes connections on to `target`; each piece is late by up to `jitter`, and `loss` in a hundred pieces are
    /// retransmitted.
    pub fn lossy(target: SocketAddr, jitter: Duration, loss: u64) -> Result<Self> {
        Self::start(target, Link { least: Duration::ZERO, jitter, loss })
    }

    /// Passes connections on to `target` as over a line with this round trip, for messages of a piece each.
    pub fn distant(target: SocketAddr, round_trip: Duration) -> Result<Self> {
        Self::start(target, Link { least: round_trip / 2, jitter: Duration::ZERO, loss: 0 })
    }

    fn start(target: SocketAddr, link: Link) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let dice = Arc::new(Dice(AtomicU64::new(1)));
        thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(far) = TcpStream::connect(target) else { continue };
                let _ = (near.set_nodelay(true), far.set_nodelay(true));
                let pairs = [(near.try_clone(), far.try_clone()), (Ok(far), Ok(near))];
                for (from, to) in pairs {
                    let (Ok(from), Ok(to)) = (from, to) else { continue };
                    let dice = Arc::clone(&dice);
                    thread::spawn(move || pass(from, to, &dice, link));
                }
            }
        });
        Ok(Self { address, stopping })
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
    }
}

/// How late a piece is: at least `least`, by up to `jitter` more, and by a retransmission in `loss` of a hundred cases.
#[derive(Debug, Clone, Copy)]
struct Link {
    least: Duration,
    jitter: Duration,
    loss: u64,
}

/// The same numbers in every run.
#[derive(Debug)]
struct Dice(AtomicU64);

impl Dice {
    fn below(&self, bound: u64) -> u64 {
        let step = |state: u64| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        let state = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, step).unwrap_or(1);
        (state >> 33) % bound.max(1)
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, dice: &Dice, link: Link) {
    let mut piece = [0; 1448];
    while let Ok(count) = from.read(&mut piece) {
        let late = link.least + Duration::from_millis(dice.below(link.jitter.as_millis() as u64 + 1));
        thread::sleep(if dice.below(100) < link.loss { late + RETRANSMISSION } else { late });
        if count == 0 || to.write_all(&piece[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
