//! Telemetry: counters in InfluxDB's line protocol, sent by UDP at regular intervals, in the form of the C++ client.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::control::{Status, counters};

/// Where counters are sent, and what is added to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Influx {
    /// The receiver.
    pub host: InfluxHost,
    /// Name of the measurement; `_absolute` and `_delta` are appended.
    pub metric: String,
    /// More tags, `key=value,key=value`, or nothing.
    pub tags: String,
    /// More fields of the absolute values, in the same form.
    pub fields: String,
    /// The interval.
    pub rate: Duration,
}

/// A receiver of telemetry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InfluxHost {
    /// Known by address.
    Address(SocketAddr),
    /// Known by name and port.
    Name(String, u16),
}

/// Counters by name.
type Values = BTreeMap<&'static str, u64>;

impl Influx {
    /// The lines for `now`, and for the change since `before` if there was one. Counters that are 0 are left out.
    fn lines(&self, fqrn: &str, now: &Values, before: Option<&Values>, time: Duration) -> String {
        let tags = if self.tags.is_empty() { String::new() } else { format!(",{}", self.tags) };
        let line = |suffix: &str, fields: Vec<String>| {
            if fields.is_empty() {
                return String::new();
            }
            format!("{}_{suffix},repo={fqrn}{tags} {} {}\n", self.metric, fields.join(","), time.as_nanos())
        };
        let shown = || now.iter().filter(|(_, value)| **value != 0);
        let absolute = shown().map(|(name, value)| format!("{name}={value}"));
        let more = (!self.fields.is_empty()).then(|| self.fields.clone());
        let mut text = line("absolute", absolute.chain(more).collect());
        if let Some(before) = before {
            let change = shown().map(|(name, value)| {
                let change = i128::from(*value) - i128::from(before.get(name).copied().unwrap_or(0));
                format!("{name}={change}")
            });
            text.push_str(&line("delta", change.collect()));
        }
        text
    }
}

/// A thread that sends; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Telemetry {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Telemetry {
    /// Sends the counters of `status` at the interval of `influx`.
    pub(crate) fn start(
        influx: Influx,
        status: impl Fn() -> Status + Send + 'static,
        resolve: impl Fn(&str) -> std::io::Result<IpAddr> + Send + 'static,
    ) -> std::io::Result<Telemetry> {
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("cvmfs-telemetry".into()).spawn(move || {
            let mut before = None;
            let mut failed = false;
            while stopped.recv_timeout(influx.rate) == Err(mpsc::RecvTimeoutError::Timeout) {
                let state = status();
                let now: Values =
                    counters(&state).into_iter().map(|counter| (counter.name, counter.value)).collect();
                let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let text = influx.lines(&state.fqrn, &now, before.as_ref(), time);
                let sent = send(&influx.host, &text, &resolve);
                if let Err(error) = &sent
                    && !failed
                {
                    // Told once until it works again.
                    tracing::warn!(host = %influx.host, %error, "telemetry cannot be sent");
                } else if sent.is_ok() && failed {
                    tracing::info!(host = %influx.host, "telemetry is sent again");
                }
                failed = sent.is_err();
                before = Some(now);
            }
        })?;
        Ok(Telemetry { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Display for InfluxHost {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            InfluxHost::Address(address) => write!(formatter, "{address}"),
            InfluxHost::Name(name, port) => write!(formatter, "{name}:{port}"),
        }
    }
}

fn send(
    host: &InfluxHost,
    text: &str,
    resolve: &dyn Fn(&str) -> std::io::Result<IpAddr>,
) -> std::io::Result<()> {
    let address = match host {
        InfluxHost::Address(address) => *address,
        // Each time: the name may mean another machine by now.
        InfluxHost::Name(name, port) => SocketAddr::new(resolve(name)?, *port),
    };
    let any: IpAddr = if address.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    socket.send_to(text.as_bytes(), address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn influx(host: InfluxHost) -> Influx {
        Influx {
            host,
            metric: "site".into(),
            tags: "rack=7".into(),
            fields: "cost=2".into(),
            rate: Duration::from_millis(10),
        }
    }

    #[test]
    fn absolute_values_and_changes_are_written_in_the_line_protocol() {
        let influx = influx(InfluxHost::Name("x".into(), 1));
        let before = Values::from([("a.n", 5), ("b.n", 9)]);
        let now = Values::from([("a.n", 7), ("b.n", 4), ("c.n", 0)]);
        let time = Duration::from_secs(3);
        assert_eq!(
            influx.lines("r.org", &now, None, time),
            "site_absolute,repo=r.org,rack=7 a.n=7,b.n=4,cost=2 3000000000\n"
        );
        assert_eq!(
            influx.lines("r.org", &now, Some(&before), time),
            "site_absolute,repo=r.org,rack=7 a.n=7,b.n=4,cost=2 3000000000\n\
             site_delta,repo=r.org,rack=7 a.n=2,b.n=-5 3000000000\n"
        );
    }

    #[test]
    fn counters_arrive_by_udp_with_their_changes_from_the_second_time_on() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let port = receiver.local_addr().unwrap().port();
        let telemetry = Telemetry::start(
            influx(InfluxHost::Name("collector".into(), port)),
            || Status { fqrn: "r.org".into(), requests: 5, ..Status::default() },
            |name| {
                assert_eq!(name, "collector");
                Ok([127, 0, 0, 1].into())
            },
        )
        .unwrap();
        let mut buffer = [0; 2048];
        let first = receiver.recv(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..first]).into_owned();
        assert!(text.starts_with("site_absolute,repo=r.org,rack=7 download.n_requests=5,cost=2 "), "{text}");
        let second = receiver.recv(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..second]).into_owned();
        assert!(text.contains("\nsite_delta,repo=r.org,rack=7 download.n_requests=0 "), "{text}");
        drop(telemetry);
    }
}
