//! What a site's administrators write: configuration files and the values in them, targets of variant links.

use cvmfs_client::config::{ClientSettings, Config, ConfigSources};
use cvmfs_client::variant;

use crate::databases::with_file;
use crate::{Bytes, Target};

pub(crate) const CONFIGURATION: Target = Target {
    name: "configuration",
    run: configuration,
    seeds: || {
        let text: [&str; 8] = [
            "CVMFS_SERVER_URL=\"http://a/cvmfs/@fqrn@;http://b/@org@\"\nCVMFS_HTTP_PROXY='http://p:3128|q;DIRECT'\n",
            "if [ \"x$CVMFS_USE_CDN\" = \"xyes\" ]; then\n  CVMFS_TIMEOUT=3 # why\nelif test -n \"$A\"; then B=1\nelse\n  C=${D:-e}\nfi\n",
            "export CVMFS_QUOTA_LIMIT=4000\nreadonly CVMFS_NFILES=1\neval CVMFS_X=\\$Y\n",
            "CVMFS_CACHE_BASE=/var/lib/cvmfs\nCVMFS_HTTP_PROXY=\"auto;DIRECT\"\nCVMFS_PAC_URLS=http://wpad/wpad.dat\n",
            "CVMFS_CACHE_PRIMARY=tiered\nCVMFS_CACHE_tiered_TYPE=tiered\nCVMFS_CACHE_tiered_UPPER=ram\nCVMFS_CACHE_ram_TYPE=ram\nCVMFS_CACHE_ram_SIZE=25%\n",
            "for x in a b; do :; done; f() { :; }\ncase $x in a) ;; esac\n. /etc/other\nA=`ls`\nB=$(ls)\n",
            "CVMFS_REPOSITORY_DATE=2024-01-01T00:00:00Z\nCVMFS_ROOT_HASH=e7d3a1bd1f3f7a3bf0b65cbe1dbeaf9b25b0d2d5\nCVMFS_KEYS_DIR=/nowhere\n",
            "CVMFS_UID_MAP=/nowhere\nCVMFS_FALLBACK_PROXY=p:1\nCVMFS_PROXY_TEMPLATE=@uuid@\nCVMFS_DNS_SERVER=127.0.0.1\nCVMFS_USE_GEOAPI=yes\n",
        ];
        text.map(|text| text.as_bytes().to_vec()).into()
    },
    words: &[
        "CVMFS_SERVER_URL=",
        "CVMFS_HTTP_PROXY=",
        "CVMFS_TIMEOUT=",
        "CVMFS_QUOTA_LIMIT=",
        "CVMFS_",
        "=",
        "\"",
        "'",
        "\\",
        "\n",
        ";",
        "$",
        "${",
        "}",
        ":-",
        "$(",
        ")",
        "`",
        "if ",
        "then\n",
        "else\n",
        "elif ",
        "fi\n",
        "[ ",
        " ]",
        "&&",
        "||",
        "#",
        "@fqrn@",
        "@org@",
        "export ",
        "eval ",
        "DIRECT",
        "auto",
        "http://",
        "|",
        "for ",
        "done",
        "case ",
        "esac",
        "{",
        "yes",
        "-1",
        "99999999999999999999",
        "%",
        "!",
        "-n ",
        "-z ",
        " = ",
    ],
};

pub(crate) const VARIANT_LINK: Target = Target {
    name: "variant_link",
    run: |bytes| {
        let value = |name: &[u8]| name.len().is_multiple_of(2).then(|| name.repeat(2));
        let expanded = variant::expand(bytes, &value);
        if !bytes.windows(2).any(|pair| pair == b"$(") {
            assert_eq!(expanded, bytes);
        }
    },
    seeds: || {
        let text: [&[u8]; 4] = [b"plain/target", b"/cvmfs/$(ARCH)/x", b"$(A:-default)$(B)", b"$(unclosed"];
        text.map(<[u8]>::to_vec).into()
    },
    words: &["$(", ")", ":-", "$", "(", "/", "$(A:-$(B))"],
};

fn configuration(bytes: &[u8]) {
    with_file(bytes, |path| {
        let files = Some(vec![path.to_owned()]);
        load(&ConfigSources { files, ..ConfigSources::default() });
    });
    // The last parts of the input as values on the command line, which know no syntax.
    let mut rest = Bytes(bytes);
    let name = usize::from(rest.byte());
    if let Ok(value) = std::str::from_utf8(rest.0) {
        const NAMES: [&str; 12] = [
            "CVMFS_HTTP_PROXY",
            "CVMFS_SERVER_URL",
            "CVMFS_FALLBACK_PROXY",
            "CVMFS_QUOTA_LIMIT",
            "CVMFS_TIMEOUT",
            "CVMFS_REPOSITORY_DATE",
            "CVMFS_ROOT_HASH",
            "CVMFS_PUBLIC_KEY",
            "CVMFS_CACHE_BASE",
            "CVMFS_DNS_SERVER",
            "CVMFS_PAC_URLS",
            "CVMFS_UID_MAP",
        ];
        let good = [
            ("CVMFS_SERVER_URL", "http://127.0.0.1:9/x"),
            ("CVMFS_HTTP_PROXY", "DIRECT"),
            ("CVMFS_PUBLIC_KEY", "/nowhere/key.pub"),
            (NAMES[name % NAMES.len()], value),
        ];
        let overrides = good.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        load(&ConfigSources { files: Some(Vec::new()), overrides, ..ConfigSources::default() });
    }
}

fn load(sources: &ConfigSources) {
    match Config::load("fuzz.example.org", sources) {
        Ok(config) => {
            for (name, setting) in config.iter() {
                assert!(!name.is_empty() && setting.value.len() <= 1 << 20, "{name} has no bound");
            }
            for notice in config.notices() {
                assert!(!notice.to_string().is_empty());
            }
            let _ = ClientSettings::from(&config).map_err(|error| error.to_string());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
