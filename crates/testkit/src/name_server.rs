//! A DNS server on loopback (UDP) that says what a test wants, or nothing at all.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use anyhow::Result;

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;

/// The server; it ends when dropped.
#[derive(Debug)]
pub struct NameServer {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    names: Mutex<HashMap<String, (Vec<IpAddr>, u32)>>,
    queries: Mutex<Vec<String>>,
    silent: AtomicBool,
    stopping: AtomicBool,
}

impl NameServer {
    /// Starts one that knows no name.
    pub fn start() -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let address = socket.local_addr()?;
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        thread::spawn(move || {
            let mut packet = [0; 4096];
            while !own.stopping.load(Ordering::SeqCst) {
                let Ok((count, from)) = socket.recv_from(&mut packet) else { continue };
                if let Some(answer) = own.answer(&packet[..count]) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok(Self { address, shared })
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// From now on `name` has these addresses, for `ttl` seconds each time.
    pub fn set(&self, name: &str, addresses: &[&str], ttl: u32) {
        let addresses = addresses.iter().filter_map(|address| address.parse().ok()).collect();
        lock(&self.shared.names).insert(name.to_ascii_lowercase(), (addresses, ttl));
    }

    /// Queries are read and not answered, or answered again.
    pub fn set_silent(&self, silent: bool) {
        self.shared.silent.store(silent, Ordering::SeqCst);
    }

    /// How often `name` was asked for, whatever the type.
    pub fn queries(&self, name: &str) -> usize {
        lock(&self.shared.queries).iter().filter(|asked| *asked == name).count()
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
    }
}

impl Shared {
    fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let (name, end) = read_name(query)?;
        let kind = u16::from_be_bytes([*query.get(end)?, *query.get(end + 1)?]);
        lock(&self.queries).push(name.clone());
        if self.silent.load(Ordering::SeqCst) {
            return None;
        }
        let names = lock(&self.names);
        let known = names.get(&name);
        let records: Vec<Vec<u8>> = known
            .map(|(addresses, _)| addresses.as_slice())
            .unwrap_or_default()
            .iter()
            .filter_map(|address| match (address, kind) {
                (IpAddr::V4(address), TYPE_A) => Some(address.octets().to_vec()),
                (IpAddr::V6(address), TYPE_AAAA) => Some(address.octets().to_vec()),
                _ => None,
            })
            .collect();
        let ttl = known.map_or(0, |(_, ttl)| *ttl);
        // Answer, recursion available, no error or "no such name"; one question.
        let mut answer = query.get(..2)?.to_vec();
        answer.extend([0x81, if known.is_some() { 0x80 } else { 0x83 }, 0, 1]);
        answer.extend(u16::try_from(records.len()).ok()?.to_be_bytes());
        answer.extend([0, 0, 0, 0]);
        answer.extend(query.get(12..end + 4)?);
        for record in records {
            // The name is that of the question.
            answer.extend([0xC0, 12]);
            answer.extend(kind.to_be_bytes());
            answer.extend([0, 1]);
            answer.extend(ttl.to_be_bytes());
            answer.extend(u16::try_from(record.len()).ok()?.to_be_bytes());
            answer.extend(record);
        }
        Some(answer)
    }
}

/// The name of the first question in lower case, and where its type begins.
fn read_name(query: &[u8]) -> Option<(String, usize)> {
    let mut at = 12;
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            return Some((labels.join("."), at));
        }
        let label = query.get(at..at + length)?;
        labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        at += length;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
