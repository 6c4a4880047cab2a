//! What the network says about the way to the network: proxy configuration files, the order of servers.

use cvmfs_client::network::fuzzing::{geo_order, proxy_answer, proxy_configuration};

use crate::Target;

pub(crate) const PROXY_SCRIPT: Target = Target {
    name: "proxy_script",
    run: proxy_script,
    seeds: || {
        let text = [
            "function FindProxyForURL(url, host) { return \"PROXY p:3128; DIRECT\"; }",
            "var a = [\"x\", 'y'], b = {k: 1};\nfunction FindProxyForURL(url, host) {\n  for (var i = 0; i < a.length; i++) { if (a[i] == 'y') break; }\n  \
             while (i-- > 0) { continue; } do { i += 1; } while (i < 3);\n  switch (host) { case 'z': return b.k ? 'DIRECT' : ''; default: }\n  \
             return shExpMatch(url, '*/cvmfs/*') && isInNet(dnsResolve(host), '10.0.0.0', '255.0.0.0') ? 'HTTPS ' + a.join(';') : 'SOCKS s:1';\n}",
            "function f(n) { return n < 2 ? n : f(n - 1) + f(n - 2); }\nfunction FindProxyForURL(u, h) { try { throw f(9); } catch (e) { return '' + e; } finally { } }",
            "function FindProxyForURL(u, h) { var r = /^(a|b)*[^c-d]\\d{2,3}?$/i; return u.replace(r, 'x').split('/').slice(1).toString().substring(0, 4) + \
             typeof r + weekdayRange('MON', 'FRI') + dateRange(1, 'JAN') + timeRange(8, 18) + myIpAddress() + dnsDomainLevels(h); }",
            "function FindProxyForURL(u, h) { var s = 'x'; for (var k in {a: 1, b: 2}) { s += k; } return ((((s)))) + (1 << 3 >>> 1 | 2 & 3 ^ 4) + -+!~1 + (void 0, null); }",
        ];
        text.map(|text| text.as_bytes().to_vec()).into()
    },
    words: &[
        "function ",
        "FindProxyForURL(url, host)",
        "return ",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        ";",
        ",",
        "=",
        "==",
        "===",
        "+",
        "-",
        "*",
        "/",
        "%",
        "<<",
        ">>>",
        "&&",
        "||",
        "!",
        "~",
        "?",
        ":",
        ".",
        "'",
        "\"",
        "\\u",
        "\\x",
        "\n",
        "//",
        "/*",
        "*/",
        "/(a*)*b/",
        "if (",
        "else ",
        "for (",
        "while (1) ",
        "do ",
        "switch (",
        "case ",
        "default:",
        "break;",
        "continue;",
        "try ",
        "catch (e) ",
        "finally ",
        "throw ",
        "var ",
        "new ",
        "typeof ",
        "delete ",
        "in ",
        "this",
        "null",
        "undefined",
        "0x7fffffff",
        "1e308",
        "s += s;",
        ".length",
        ".repeat(99999999)",
        ".split('')",
        ".join(",
        ".push(",
        "dnsResolve(",
        "isInNet(",
        "shExpMatch(",
        "'*?*?*?*?*'",
        "url",
        "host",
    ],
};

pub(crate) const GEO_REPLY: Target = Target {
    name: "geo_reply",
    run: |bytes| {
        for count in [0, 1, 3, 8] {
            let Some(mut order) = geo_order(bytes, count) else { continue };
            order.sort_unstable();
            assert!(order.into_iter().eq(0..count), "no permutation of {count}");
        }
    },
    seeds: || vec![b"2,1,3\n".to_vec(), b"1\n".to_vec(), b"8,7,6,5,4,3,2,1\n".to_vec()],
    words: &[",", "\n", "0", "1", "99999999999999999999", "-1", " ", "+1"],
};

fn proxy_script(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Err(message) = proxy_configuration(&text) {
        assert!(message.len() < 4096 && !message.contains('\0'), "a message of {} bytes", message.len());
    }
    assert!(proxy_answer(&text).len() <= 32, "more proxies than anybody needs");
}
