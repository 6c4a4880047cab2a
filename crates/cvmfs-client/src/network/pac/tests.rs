use std::cell::Cell;

use super::*;

/// A world in which a few names resolve.
#[derive(Default)]
struct World {
    lookups: Cell<u32>,
}

impl Surroundings for World {
    fn resolve(&self, name: &str) -> Vec<IpAddr> {
        self.lookups.set(self.lookups.get() + 1);
        match name {
            "s1.example.org" => vec!["10.1.2.3".parse().unwrap()],
            _ => Vec::new(),
        }
    }

    fn own_address(&self) -> IpAddr {
        "192.168.7.9".parse().unwrap()
    }

    fn unix_time(&self) -> i64 {
        // Wednesday, 2024-02-28 12:30:00 UTC
        1_709_123_400
    }
}

fn answer(script: &str) -> Result<String, PacError> {
    find_proxy(script, "http://s1.example.org/cvmfs/a/.cvmfspublished", "s1.example.org", &World::default())
}

/// The value of an expression as text.
fn value(expression: &str) -> String {
    let script = format!("function FindProxyForURL(url, host) {{ return '' + ({expression}); }}");
    answer(&script).unwrap_or_else(|error| panic!("{expression}: {error}"))
}

#[test]
fn a_file_as_sites_have_it_names_the_proxies() {
    let script = r#"
        // proxies of the site
        var local = ["squid1.example.org:3128", "squid2.example.org:3128"];
        function FindProxyForURL(url, host) {
            if (isPlainHostName(host) || dnsDomainIs(host, ".local.net")) return "DIRECT";
            if (shExpMatch(url, "*/cvmfs/*") && isInNet(dnsResolve(host), "10.0.0.0", "255.0.0.0")) {
                var result = "";
                for (var i = 0; i < local.length; i++) {
                    if (i > 0) result += "; ";
                    result += "PROXY " + local[i];
                }
                return result + "; DIRECT";
            }
            return "DIRECT";
        }
    "#;
    let found = answer(script).unwrap();
    assert_eq!(found, "PROXY squid1.example.org:3128; PROXY squid2.example.org:3128; DIRECT");
    let expected =
        ProxyGroup::parse_list("http://squid1.example.org:3128;http://squid2.example.org:3128;DIRECT")
            .unwrap();
    assert_eq!(groups(&found), expected);
}

#[test]
fn alternatives_become_groups_and_those_that_are_no_http_proxies_are_left_out() {
    let found =
        groups("PROXY http://a:3128 ;SOCKS s:1080; HTTPS b:443; proxy c:1; PROXY not a host; DIRECT;");
    let expected = ProxyGroup::parse_list("http://a:3128;https://b:443;http://c:1;DIRECT").unwrap();
    assert_eq!(found, expected);
    assert_eq!(groups("").len(), 0);
}

#[test]
fn expressions_have_the_values_of_the_language() {
    let cases = [
        ("1 + 2 * 3 - 4 / 2", "5"),
        ("'a' + 1 + 2", "a12"),
        ("1 + 2 + 'a'", "3a"),
        ("'5' * '2'", "10"),
        ("0.1 + 0.2", "0.30000000000000004"),
        ("7 % 3", "1"),
        ("1 == '1'", "true"),
        ("1 === '1'", "false"),
        ("null == undefined", "true"),
        ("null == 0", "false"),
        ("NaN == NaN", "false"),
        ("'b' > 'a' && 10 > 9", "true"),
        ("0 || '' || 'x'", "x"),
        ("1 && 0 && 2", "0"),
        (
            "typeof nothing + typeof 1 + typeof 'a' + typeof [] + typeof isInNet",
            "undefinednumberstringobjectfunction",
        ),
        ("!0 ? 'yes' : 'no'", "yes"),
        ("(1, 2, 3)", "3"),
        ("-1 >>> 28", "15"),
        ("5 & 6 | 8 ^ 1", "13"),
        ("~5", "-6"),
        ("'Squid.Example'.toLowerCase().indexOf('example')", "6"),
        (
            "'abcdef'.substring(4, 1) + 'abcdef'.substr(-2) + 'abcdef'.slice(1, -3) + 'abc'.charAt(1)",
            "bcdefbcb",
        ),
        ("'a,b,c'.split(',').length", "3"),
        ("'a-b-c'.split('-').join('+')", "a+b+c"),
        ("'10.1.2.3'.match(/^(\\d+)\\.(\\d+)/)[2]", "1"),
        ("/EXAMPLE\\.org$/i.test('s1.example.org')", "true"),
        ("'a1b'.replace(/[0-9]/, '-')", "a-b"),
        ("[1, [2, 3]]", "1,2,3"),
        ("({a: 1, 'b': 2}).b", "2"),
        ("parseInt('42px') + parseInt('0x10') + parseInt('11', 2)", "61"),
        ("parseInt('x')", "NaN"),
        ("Math.floor(3.7) + Math.max(1, 2)", "5"),
        ("function (a) { return a * 2; }(21)", "42"),
        ("'x'.length + [1,2].concat([3]).length", "4"),
        ("isPlainHostName('www') && !isPlainHostName('www.x')", "true"),
        ("dnsDomainLevels('a.b.c')", "2"),
        ("localHostOrDomainIs('www', 'www.x.org')", "true"),
        ("isResolvable('s1.example.org') && !isResolvable('nowhere')", "true"),
        ("dnsResolve('nowhere')", "null"),
        ("isInNet(host, '10.1.0.0', '255.255.0.0')", "true"),
        ("isInNet(myIpAddress(), '192.168.0.0', '255.255.0.0')", "true"),
        ("shExpMatch('http://a.b/c', '*a?b*c') && !shExpMatch('x', 'y*')", "true"),
        ("weekdayRange('MON', 'FRI') && !weekdayRange('SAT', 'SUN')", "true"),
        ("weekdayRange('FRI', 'WED')", "true"),
        ("timeRange(12) && timeRange(12, 13) && timeRange(22, 13) && !timeRange(8, 11)", "true"),
        ("timeRange(12, 0, 12, 45, 'GMT')", "true"),
        ("dateRange('FEB') && dateRange(28) && dateRange(2024) && !dateRange('MAR')", "true"),
        ("dateRange('JAN', 'MAR') && dateRange(1, 'FEB', 1, 'MAR') && dateRange('DEC', 'FEB')", "true"),
    ];
    for (expression, expected) in cases {
        assert_eq!(value(expression), expected, "{expression}");
    }
}

#[test]
fn statements_do_what_the_language_says() {
    let script = r"
        function FindProxyForURL(url, host) {
            var out = '', i = 0;
            do { i++; if (i == 2) continue; if (i > 4) break; out += i; } while (true);
            while (i > 0) { i -= 3 }
            out += i;
            for (var key in {b: 1, a: 2}) out += key;
            switch (out.length) { case 1: out += 'no'; case 6: out += '!'; break; default: out += '?' }
            try { throw 'oops'; } catch (e) { out += e; } finally { out += '.'; }
            function counter() { var n = 0; return function () { return ++n; }; }
            var count = counter(); count();
            out += count();
            if (later() !== 'later') return 'wrong'; else ;
            return out;
            function later() { return 'later' }
        }";
    assert_eq!(answer(script).unwrap(), "134-1ab?oops.2");
}

#[test]
fn what_is_wrong_with_a_file_is_named_with_its_line() {
    let cases = [
        ("function FindProxyForURL(url, host) {\n return x; }", 2, "'x' is not defined"),
        ("var a = 1;", 0, "no function FindProxyForURL"),
        ("function FindProxyForURL(url, host) {\n\n return 'a }", 3, "string without end"),
        ("function FindProxyForURL(url, host) { return 1", 1, "without end"),
        ("class A {}", 1, "'class' is not supported"),
        ("function FindProxyForURL(url, host) {\n throw 'no'; }", 2, "exception: no"),
        ("function FindProxyForURL(url, host) { return url.foo(); }", 1, "foo is not supported"),
        ("function FindProxyForURL(url, host) { return null.x; }", 1, "not there"),
        ("<html>Login</html>", 1, "web page"),
        ("\u{1F980}", 1, "unknown character"),
    ];
    for (script, line, words) in cases {
        let error = answer(script).unwrap_err();
        assert!(error.reason.contains(words), "{script}: {error}");
        assert!(line == 0 || error.line == line, "{script}: {error}");
    }
}

#[test]
fn a_hostile_file_ends_in_bounded_time_and_memory() {
    let body = |text: &str| format!("function FindProxyForURL(url, host) {{ {text} }}");
    let hostile = [
        body("while (true) {}"),
        body("for (;;) ;"),
        body("var s = 'x'; while (true) s += s;"),
        body("var a = []; while (true) a.push(a);"),
        body("var a = []; a[1e9] = 1;"),
        body("var a = []; a[0] = a; return '' + a;"),
        body("var a = [1]; while (true) a = a.concat(a);"),
        body("return FindProxyForURL(url, host);"),
        body("function f() { try { f(); } catch (e) { f(); } } f();"),
        body("var o = {}; var i = 0; while (true) o['k' + i++] = 'v';"),
        body("while (true) isResolvable('x');"),
        body("var s = 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'; while (true) /(a*)*b/.test(s);"),
        body("return /(((((a{100}){100}){100}){100}){100})/.test('a');"),
        body("var f = function () {}; while (true) f = function () { return f; };"),
        body(&format!("return {}1{};", "(".repeat(100_000), ")".repeat(100_000))),
        body(&format!("return {}1;", "!".repeat(100_000))),
        "{".repeat(100_000),
        body(&format!("return a{};", ".b".repeat(100_000))),
        body(&format!("return {}1;", "a ? ".repeat(100_000))),
        "x".repeat(MAX_SCRIPT + 1),
    ];
    for script in hostile {
        let begun = std::time::Instant::now();
        assert!(answer(&script).is_err(), "{}", script.chars().take(100).collect::<String>());
        assert!(begun.elapsed().as_secs() < 20, "{}", script.chars().take(100).collect::<String>());
    }
    let long = body(&format!("return {} 'end';", "host == 'x' || ".repeat(5000)));
    assert_eq!(answer(&long).unwrap(), "end", "a long condition is no nesting");
}

#[test]
fn rubbish_never_panics() {
    let pieces = [
        "function",
        "FindProxyForURL",
        "(",
        ")",
        "{",
        "}",
        "url",
        "host",
        ",",
        ";",
        "return",
        "'a'",
        "\"",
        "/",
        "1",
        ".",
        "[",
        "]",
        "+",
        "=",
        "==",
        "var",
        "for",
        "in",
        "if",
        "else",
        "while",
        "switch",
        "case",
        ":",
        "?",
        "\\",
        "\n",
        "new",
        "typeof",
        "ä",
    ];
    let mut state = 1_u64;
    for _ in 0..20_000 {
        let mut script = String::new();
        for _ in 0..12 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            script.push_str(pieces[(state >> 33) as usize % pieces.len()]);
            script.push(' ');
        }
        let _ = answer(&script);
    }
}
