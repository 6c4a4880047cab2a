//! The commands of the control socket, and the lists of servers and proxies in them.

use cvmfs_fuse::control::Command;

use crate::Target;
use crate::snapshots::Bench;

pub(crate) const CONTROL: Target = Target {
    name: "control",
    run: control,
    seeds: || {
        let text = [
            "status json",
            "cache list pinned",
            "cache limit set 100",
            "cleanup rate 5",
            "evict /a/b",
            "chroot e7d3a1bd1f3f7a3bf0b65cbe1dbeaf9b25b0d2d5\n",
            "max ttl set 5\0",
            "nameserver set ::1",
            "host set http://a/x;http://b/y",
            "external host set http://a",
            "proxy set 10.0.0.1:3128|http://10.0.0.2;DIRECT",
            "proxy fallback http://u:p@10.0.0.3:1",
            "timeout set 5 10",
            "send mount fd /run/x.sock",
            "internal affairs",
            "remount sync",
            "pin /x\r\n",
        ];
        text.map(|text| text.as_bytes().to_vec()).into()
    },
    words: &[
        "cache ",
        "limit ",
        "set ",
        "get",
        "host ",
        "proxy ",
        "external ",
        "info",
        "fallback ",
        "timeout ",
        "nameserver ",
        "evict ",
        "pin ",
        "cleanup ",
        "rate ",
        "chroot ",
        "http://",
        "https://",
        "DIRECT",
        "auto",
        ";",
        "|",
        ",",
        ":",
        "[::1]",
        "@",
        "%",
        "+",
        "/",
        " ",
        "\0",
        "\n",
        "-1",
        "18446744073709551616",
        "0x10",
        "1e3",
    ],
};

fn control(bytes: &[u8]) {
    thread_local! {
        static BENCH: Bench = Bench::new();
    }
    let command = match Command::parse(bytes) {
        Ok(command) => command,
        Err(line) => {
            assert!(!line.is_empty() && !line.contains("panic"), "{line}");
            return;
        }
    };
    BENCH.with(|bench| {
        let fetcher = bench.store.fetcher();
        match command {
            Command::HostSet(_, list) => drop(fetcher.set_hosts(&list)),
            Command::ProxySet(_, list) if has_no_names(&list) => drop(fetcher.set_proxies(&list)),
            Command::ProxyFallback(list) if has_no_names(&list) => drop(fetcher.set_fallback_proxies(&list)),
            Command::TimeoutSet(proxied, direct) => fetcher.set_timeouts(proxied, direct),
            Command::HostSwitch(_) => fetcher.switch_host(),
            _ => {}
        }
        for host in fetcher.host_info() {
            assert!(host.url.contains("://"), "{host:?}");
        }
        for proxy in fetcher.proxy_info().groups.into_iter().flatten() {
            assert!(!proxy.url.contains('@'), "credentials are shown: {proxy:?}");
        }
    });
}

/// Whether a list can be taken without asking a name server, which takes seconds.
fn has_no_names(list: &str) -> bool {
    let rest = list.replace("https://", "").replace("http://", "").replace("DIRECT", "");
    !rest.contains(|letter: char| letter.is_alphabetic())
}
