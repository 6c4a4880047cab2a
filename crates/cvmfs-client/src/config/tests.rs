use super::*;

struct Etc(tempfile::TempDir);

impl Etc {
    fn new(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Self(directory)
    }

    fn sources(&self) -> ConfigSources {
        ConfigSources { directory: self.0.path().to_owned(), ..ConfigSources::default() }
    }

    fn load(&self, fqrn: &str) -> Config {
        Config::load(fqrn, &self.sources()).unwrap()
    }
}

fn value<'a>(config: &'a Config, name: &str) -> Option<&'a str> {
    config.get(name).map(|setting| setting.value.as_str())
}

const MINIMAL: [(&str, &str); 3] = [
    ("default.local", "CVMFS_HTTP_PROXY=DIRECT\n"),
    ("config.d/a.example.org.conf", "CVMFS_SERVER_URL=\"http://s1/cvmfs/@fqrn@/;http://s2/@org@\"\n"),
    ("keys/a.example.org.pub", "key"),
];

#[test]
fn later_files_win_in_the_order_of_the_specification() {
    let order = [
        "default.conf",
        "default.d/10-a.conf",
        "default.d/20-b.conf",
        "default.local",
        "domain.d/example.org.conf",
        "domain.d/example.org.local",
        "config.d/a.example.org.conf",
        "config.d/a.example.org.local",
    ];
    for last in 0..order.len() {
        let texts: Vec<String> = order.iter().map(|name| format!("X={name}\n")).collect();
        let files: Vec<(&str, &str)> =
            order.iter().copied().zip(texts.iter().map(String::as_str)).take(last + 1).collect();
        let etc = Etc::new(&files);
        assert_eq!(value(&etc.load("a.example.org"), "X"), Some(order[last]));
    }
}

#[test]
fn files_of_other_repositories_and_domains_are_not_read() {
    let etc = Etc::new(&[
        ("config.d/b.example.org.conf", "X=1"),
        ("domain.d/org.conf", "X=1"),
        ("default.d/x.bak", "X=1"),
    ]);
    assert_eq!(value(&etc.load("a.example.org"), "X"), None);
}

#[test]
fn each_value_remembers_its_file_and_line() {
    let etc = Etc::new(&[("default.conf", "\n# comment\nexport CVMFS_TIMEOUT=7\n")]);
    let config = etc.load("a.example.org");
    let origin = config.get("CVMFS_TIMEOUT").unwrap().origin.to_string();
    assert_eq!(origin, format!("{}/default.conf:3", etc.0.path().display()));
}

#[test]
fn later_files_see_the_values_of_earlier_ones_and_the_name() {
    let etc = Etc::new(&[("default.conf", "A=1\n"), ("default.local", "X=\"$A-$CVMFS_FQRN\"\n")]);
    assert_eq!(value(&etc.load("a.example.org"), "X"), Some("1-a.example.org"));
}

#[test]
fn options_win_over_all_files() {
    let etc = Etc::new(&[("config.d/a.example.org.local", "CVMFS_TIMEOUT=1")]);
    let mut sources = etc.sources();
    sources.overrides = vec![("CVMFS_TIMEOUT".into(), "9".into())];
    let config = Config::load("a.example.org", &sources).unwrap();
    assert_eq!(
        config.get("CVMFS_TIMEOUT").unwrap(),
        &Setting { value: "9".into(), origin: Origin::Override }
    );
}

#[test]
fn explicit_files_replace_the_directory_and_must_exist() {
    let etc = Etc::new(&[("default.conf", "A=directory"), ("one", "A=one\nB=one"), ("two", "B=two")]);
    let file = |name: &str| etc.0.path().join(name);
    let mut sources = etc.sources();
    sources.files = Some(vec![file("one"), file("two")]);
    let config = Config::load("a.example.org", &sources).unwrap();
    assert_eq!((value(&config, "A"), value(&config, "B")), (Some("one"), Some("two")));
    sources.files = Some(vec![file("absent")]);
    assert!(Config::load("a.example.org", &sources).unwrap_err().to_string().contains("absent"));
}

#[test]
fn the_configuration_repository_is_read_between_the_local_files() {
    let cvmfs = tempfile::tempdir().unwrap();
    let shared = cvmfs.path().join("config.example.org/etc/cvmfs");
    for (name, text) in [
        ("default.conf", "A=shared\nB=shared\n"),
        ("domain.d/example.org.conf", "C=shared\nD=shared\n"),
        ("config.d/a.example.org.conf", "E=shared\nF=shared\n"),
    ] {
        std::fs::create_dir_all(shared.join(name).parent().unwrap()).unwrap();
        std::fs::write(shared.join(name), text).unwrap();
    }
    let default = format!(
        "CVMFS_CONFIG_REPOSITORY=config.example.org\nCVMFS_MOUNT_DIR={}\nA=default\n",
        cvmfs.path().display()
    );
    let etc = Etc::new(&[
        ("default.conf", &default),
        ("default.local", "B=local\nC=local\nCVMFS_CONFIG_REPOSITORY=other.example.org\n"),
        ("domain.d/example.org.conf", "D=domain\n"),
        ("config.d/a.example.org.conf", "F=repository\n"),
    ]);
    let config = etc.load("a.example.org");
    let values: Vec<_> =
        ["A", "B", "C", "D", "E", "F"].iter().map(|name| value(&config, name).unwrap()).collect();
    assert_eq!(values, ["shared", "local", "shared", "domain", "shared", "repository"]);
    assert_eq!(value(&config, "CVMFS_CONFIG_REPOSITORY"), Some("config.example.org"));
    assert!(config.notices().iter().any(|notice| notice.message.contains("cannot be changed")));
}

#[test]
fn a_missing_configuration_repository_is_a_notice_unless_it_is_required() {
    let etc = Etc::new(&[(
        "default.conf",
        "CVMFS_CONFIG_REPOSITORY=config.example.org\nCVMFS_MOUNT_DIR=/absent\n",
    )]);
    let config = etc.load("a.example.org");
    assert!(config.notices()[0].to_string().contains("/absent/config.example.org"), "{:?}", config.notices());
    let etc = Etc::new(&[(
        "default.conf",
        "CVMFS_CONFIG_REPOSITORY=config.example.org\nCVMFS_MOUNT_DIR=/absent\nCVMFS_CONFIG_REPO_REQUIRED=yes\n",
    )]);
    let error = Config::load("a.example.org", &etc.sources()).unwrap_err();
    assert!(matches!(error, ConfigError::ConfigRepository { .. }), "{error}");
}

#[test]
fn unknown_and_unsupported_parameters_are_reported_with_their_place() {
    let etc = Etc::new(&[(
        "default.local",
        "CVMFS_HTTP_PROXI=DIRECT\nCVMFS_NFS_SOURCE=yes\nCVMFS_USE_GEOAPI=no\nSITE_NAME=x\n",
    )]);
    let config = etc.load("a.example.org");
    let notices: Vec<String> = config.notices().iter().map(ToString::to_string).collect();
    assert_eq!(notices.len(), 2, "{notices:?}");
    assert!(
        notices[0]
            .contains("default.local:1: unknown parameter CVMFS_HTTP_PROXI; did you mean CVMFS_HTTP_PROXY?")
    );
    assert!(notices[1].contains("default.local:2: CVMFS_NFS_SOURCE is not supported yet"));
}

#[test]
fn one_file_each_for_proxy_and_repository_and_a_key_suffice() {
    let etc = Etc::new(&MINIMAL);
    let settings = ClientSettings::from(&etc.load("a.example.org")).unwrap();
    assert_eq!(settings.network.servers, ["http://s1/cvmfs/a.example.org", "http://s2/a"]);
    assert_eq!(settings.network.proxies.regular, [ProxyGroup::Listed(vec![Proxy::Direct])]);
    assert_eq!(settings.public_keys, [etc.0.path().join("keys/a.example.org.pub")]);
    assert_eq!(settings.cache_directory, Path::new("/var/lib/cvmfs/shared"));
    assert_eq!(settings.cache.primary.limit(), 4000 << 20);
    assert_eq!(settings.network.timeout_direct, Duration::from_secs(10));
}

#[test]
fn paths_below_etc_cvmfs_mean_the_configuration_directory() {
    let etc = Etc::new(&MINIMAL);
    let mut sources = etc.sources();
    sources.overrides = vec![("CVMFS_PUBLIC_KEY".into(), "/etc/cvmfs/keys/a.pub:/opt/b.pub".into())];
    let settings = ClientSettings::from(&Config::load("a.example.org", &sources).unwrap()).unwrap();
    assert_eq!(settings.public_keys, [etc.0.path().join("keys/a.pub"), PathBuf::from("/opt/b.pub")]);
    assert_eq!(settings.blacklists, [etc.0.path().join("blacklist")]);
}

#[test]
fn proxies_form_groups_and_direct_counts_only_without_a_fallback() {
    let etc = Etc::new(&MINIMAL);
    let url = |text: &str| Proxy::Url(text.to_owned());
    let load = |overrides: &[(&str, &str)]| {
        let mut sources = etc.sources();
        sources.overrides = overrides.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        ClientSettings::from(&Config::load("a.example.org", &sources).unwrap())
    };
    let listed = ProxyGroup::Listed;
    let settings = load(&[("CVMFS_HTTP_PROXY", "http://p1:3128|p2:3128;http://p3;;auto;DIRECT")]).unwrap();
    let expected = [
        listed(vec![url("http://p1:3128"), url("http://p2:3128")]),
        listed(vec![url("http://p3")]),
        ProxyGroup::Auto,
        listed(vec![Proxy::Direct]),
    ];
    assert_eq!(settings.network.proxies.regular, expected);
    let settings = load(&[
        ("CVMFS_HTTP_PROXY", "http://p1;DIRECT"),
        ("CVMFS_FALLBACK_PROXY", "http://f1|http://f2;DIRECT"),
    ])
    .unwrap();
    assert_eq!(settings.network.proxies.regular, [listed(vec![url("http://p1")])]);
    assert_eq!(settings.network.proxies.fallback, [listed(vec![url("http://f1"), url("http://f2")])]);
    for bad in ["", "auto|http://x", "ftp://x", "file:///x", "http://", " ; ", "http://a b"] {
        assert!(load(&[("CVMFS_HTTP_PROXY", bad)]).is_err(), "{bad:?}");
    }
}

#[test]
fn passwords_of_proxies_stay_out_of_logs() {
    assert_eq!(Proxy::Url("http://user:secret@p1:3128".into()).display(), "http://p1:3128");
    let etc = Etc::new(&MINIMAL);
    let mut sources = etc.sources();
    sources.overrides = vec![("CVMFS_HTTP_PROXY".into(), "http://user:secret@p:x|http://q".into())];
    let error =
        ClientSettings::from(&Config::load("a.example.org", &sources).unwrap()).unwrap_err().to_string();
    assert!(error.contains("http://***@p:x|http://q") && !error.contains("secret"), "{error}");
}

#[test]
fn external_files_have_servers_of_their_own_and_inherit_the_rest() {
    let etc = Etc::new(&MINIMAL);
    let load = |overrides: &[(&str, &str)]| {
        let mut sources = etc.sources();
        sources.overrides = overrides.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        ClientSettings::from(&Config::load("a.example.org", &sources).unwrap()).unwrap()
    };
    assert_eq!(load(&[]).external, None);
    let external = load(&[
        ("CVMFS_EXTERNAL_URL", "https://data.example.org/a/"),
        ("CVMFS_HTTP_PROXY", "http://p"),
        ("CVMFS_EXTERNAL_TIMEOUT", "7"),
        ("CVMFS_MAX_RETRIES", "3"),
    ])
    .external
    .unwrap();
    assert_eq!(external.servers, ["https://data.example.org/a"]);
    assert_eq!(external.proxies.regular, [ProxyGroup::Listed(vec![Proxy::Direct])], "not the repository's");
    assert_eq!((external.timeout, external.max_retries), (Duration::from_secs(7), 3));
}

#[test]
fn wrong_network_parameters_are_refused_with_their_place() {
    let etc = Etc::new(&MINIMAL);
    for (name, value) in [
        ("CVMFS_DNS_SERVER", "dns.example.org"),
        ("CVMFS_IPFAMILY_PREFER", "5"),
        ("CVMFS_HTTP_TRACING_HEADERS", "a b:c"),
        ("CVMFS_HTTP_TRACING_HEADERS", "key"),
        ("CVMFS_SERVER_URL", "http://user:secret@h/"),
        ("CVMFS_SERVER_URL", "gopher://h/"),
    ] {
        let mut sources = etc.sources();
        sources.overrides = vec![(name.into(), value.into())];
        let error = ClientSettings::from(&Config::load("a.example.org", &sources).unwrap()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn wrong_values_are_refused_with_file_and_line() {
    for bad in [
        "CVMFS_QUOTA_LIMIT=4GB",
        "CVMFS_QUOTA_LIMIT=-5",
        "CVMFS_TIMEOUT=soon",
        "CVMFS_TIMEOUT=-1",
        "CVMFS_SHARED_CACHE=maybe",
        "CVMFS_SERVER_URL=s1/cvmfs",
    ] {
        let mut files = MINIMAL.to_vec();
        files.push(("config.d/a.example.org.local", bad));
        let etc = Etc::new(&files);
        let error = ClientSettings::from(&etc.load("a.example.org")).unwrap_err().to_string();
        assert!(error.contains("a.example.org.local:1: CVMFS_"), "{error}");
    }
}

#[test]
fn an_unconfigured_repository_is_told_which_files_to_add() {
    let etc = Etc::new(&[]);
    let error = ClientSettings::from(&etc.load("a.example.org")).unwrap_err().to_string();
    assert!(error.contains("CVMFS_SERVER_URL is not set for repository a.example.org"), "{error}");
    assert!(error.contains("config.d/a.example.org.conf"), "{error}");
    let etc = Etc::new(&MINIMAL[..2]);
    let error = ClientSettings::from(&etc.load("a.example.org")).unwrap_err().to_string();
    assert!(error.contains("no public key") && error.contains("keys"), "{error}");
    let etc = Etc::new(&MINIMAL[1..]);
    let error = ClientSettings::from(&etc.load("a.example.org")).unwrap_err().to_string();
    assert!(error.contains("CVMFS_HTTP_PROXY is not set") && error.contains("default.local"), "{error}");
}

#[test]
fn cache_directories_follow_base_sharing_and_explicit_directory() {
    let etc = Etc::new(&MINIMAL);
    let directory = |overrides: &[(&str, &str)]| {
        let mut sources = etc.sources();
        sources.overrides = overrides.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        ClientSettings::from(&Config::load("a.example.org", &sources).unwrap())
            .map(|settings| settings.cache_directory)
    };
    assert_eq!(directory(&[("CVMFS_CACHE_BASE", "/c")]).unwrap(), Path::new("/c/shared"));
    assert_eq!(
        directory(&[("CVMFS_CACHE_BASE", "/c"), ("CVMFS_SHARED_CACHE", "no")]).unwrap(),
        Path::new("/c/a.example.org")
    );
    assert_eq!(directory(&[("CVMFS_CACHE_DIR", "/d")]).unwrap(), Path::new("/d"));
    assert!(directory(&[("CVMFS_CACHE_DIR", "/d"), ("CVMFS_CACHE_BASE", "/c")]).is_err());
}

#[test]
fn a_huge_file_is_refused() {
    let etc = Etc::new(&[("default.conf", &"#".repeat(MAX_FILE as usize + 1))]);
    let error = Config::load("a.example.org", &etc.sources()).unwrap_err();
    assert!(matches!(error, ConfigError::TooLarge { .. }), "{error}");
}

#[test]
fn the_default_domain_is_known_before_the_repository() {
    let etc = Etc::new(&[
        ("default.conf", "CVMFS_DEFAULT_DOMAIN=cern.ch"),
        ("default.local", "CVMFS_DEFAULT_DOMAIN=desy.de"),
    ]);
    assert_eq!(Config::default_domain(&etc.sources()).unwrap().as_deref(), Some("desy.de"));
}

/// The forms that the distributed configuration of the C++ client and of its configuration repositories consist of.
#[test]
fn distributed_configuration_has_its_values_without_a_shell() {
    let cvmfs = tempfile::tempdir().unwrap();
    let shared = cvmfs.path().join("config.example.org/etc/cvmfs");
    for (name, text) in [
        (
            "common.conf",
            "if [ \"$CVMFS_CLIENT_PROFILE\" = \"single\" ]; then\n  if [ \"$CVMFS_HTTP_PROXY\" = \"\" ]; then\n    \
             CVMFS_HTTP_PROXY=\"auto;DIRECT\"\n  fi\nfi\nif [ -z \"$CVMFS_USE_CDN\" ]; then\n  \
             if [ \"$CVMFS_HTTP_PROXY\" = \"DIRECT\" ] || [ \"$CVMFS_HTTP_PROXY\" = \"auto;DIRECT\" ]; then\n    \
             CVMFS_USE_CDN=yes\n  fi\nfi\n",
        ),
        (
            "default.conf",
            "if [ -z \"$CVMFS_PAC_URLS\" ]; then\n  if [ \"$((RANDOM % 2))\" -eq 1 ]; then\n    \
             CVMFS_PAC_URLS=\"http://one;http://two\"\n  else\n    CVMFS_PAC_URLS=\"http://two;http://one\"\n  fi\nfi\n",
        ),
        (
            "domain.d/example.org.conf",
            "CVMFS_USE_CDN=\"$CVMFS_USE_CDN\"\nCVMFS_HTTP_PROXY=\"$CVMFS_HTTP_PROXY\"\n. ../common.conf\n\
             if [ \"$CVMFS_USE_CDN\" = \"yes\" ]; then\n  CVMFS_SERVER_URL=\"http://cdn/cvmfs/@fqrn@\"\nelse\n  \
             CVMFS_SERVER_URL=\"http://s1/cvmfs/@fqrn@\"\nfi\n\
             CVMFS_KEYS_DIR=$CVMFS_MOUNT_DIR/$CVMFS_CONFIG_REPOSITORY/etc/cvmfs/keys/example.org\n",
        ),
        (
            "config.d/a.example.org.conf",
            "if [ -z $CVMFS_NFILES ] || [ $CVMFS_NFILES -lt 524288 ]; then\n  CVMFS_NFILES=524288\nfi\n",
        ),
    ] {
        std::fs::create_dir_all(shared.join(name).parent().unwrap()).unwrap();
        std::fs::write(shared.join(name), text).unwrap();
    }
    let base = format!(
        "CVMFS_CLIENT_PROFILE=\nCVMFS_QUOTA_LIMIT=4000\nif [ \"x$CVMFS_BASE_ENV\" = \"x\" ]; then\n  \
         readonly CVMFS_MOUNT_DIR={}\n  readonly CVMFS_BASE_ENV=1\nfi\n",
        cvmfs.path().display()
    );
    let package = "CVMFS_CONFIG_REPO_DEFAULT_ENV=\n\
        if [ -f /etc/no/such/debian ] && grep -q \"wheezy\\|jessie\" /etc/no/such/debian;\nthen\n    :\nelse\n    \
        CVMFS_CONFIG_REPOSITORY=config.example.org\nfi\nCVMFS_DEFAULT_DOMAIN=example.org\n";
    let outdated = "if [ \"$CVMFS_USE_CDN\" != \"\" ]; then\n  return\nfi\nCVMFS_SERVER_URL=http://old\n";
    let etc = Etc::new(&[
        ("default.conf", &base),
        ("default.d/50-package.conf", package),
        ("default.local", "CVMFS_CLIENT_PROFILE=single\n"),
        ("domain.d/example.org.conf", outdated),
    ]);
    let config = etc.load("a.example.org");
    assert_eq!(value(&config, "CVMFS_HTTP_PROXY"), Some("auto;DIRECT"));
    assert_eq!(value(&config, "CVMFS_PAC_URLS"), Some("http://two;http://one"));
    assert_eq!(value(&config, "CVMFS_SERVER_URL"), Some("http://cdn/cvmfs/a.example.org"));
    assert_eq!(value(&config, "CVMFS_NFILES"), Some("524288"));
    let keys = shared.join("keys/example.org");
    assert_eq!(value(&config, "CVMFS_KEYS_DIR"), keys.to_str());
    let foreign = |notice: &&Notice| notice.kind != NoticeKind::NotSupported;
    assert_eq!(config.notices().iter().filter(foreign).collect::<Vec<_>>(), [] as [&Notice; 0]);
    let origin = config.get("CVMFS_USE_CDN").unwrap().origin.to_string();
    assert!(origin.ends_with("etc/cvmfs/common.conf:8"), "{origin}");
}

#[test]
fn row_70_each_mistake_in_a_file_is_reported_with_its_line() {
    for (text, words) in [
        (
            "A=1\nCVMFS_HTTP_PROXI=x\n",
            ":2: unknown parameter CVMFS_HTTP_PROXI; did you mean CVMFS_HTTP_PROXY?",
        ),
        (
            "CVMFS_TIMEOUT=5\nA=b\nCVMFS_TIMEOUT=6\n",
            ":3: CVMFS_TIMEOUT was already set in line 1 of this file",
        ),
        ("\n. ./default.local\n", ":2: file is not read here: "),
        (". other.conf\n", "other.conf:1: file is not read here: "),
        (". absent.conf\n", ":1: file is not read here: cannot read configuration file "),
        (". /dev/zero\n", "not a regular file"),
        ("X='open\n", ":1: quote is not closed in this line"),
        ("CVMFS_TIMEOUT = 5\n", ":1: shell command 'CVMFS_TIMEOUT' is not executed"),
        ("CVMFS_SERVER_URL=http://a;http://b\n", "needs quotes"),
    ] {
        let etc = Etc::new(&[("default.local", text), ("other.conf", ". default.local\n")]);
        let config = etc.load("a.example.org");
        let notices: Vec<String> = config.notices().iter().map(ToString::to_string).collect();
        assert!(notices.iter().any(|notice| notice.contains(words)), "{text:?}: {notices:?}");
    }
}

#[test]
fn row_70_a_value_of_the_wrong_type_or_with_a_unit_is_refused_with_its_line() {
    for bad in
        ["CVMFS_QUOTA_LIMIT=4GB", "CVMFS_TIMEOUT=5s", "CVMFS_SHARED_CACHE=ja", "CVMFS_MAX_RETRIES=many"]
    {
        let mut files = MINIMAL.to_vec();
        let text = format!("# a comment\n{bad}\n");
        files.push(("config.d/a.example.org.local", &text));
        let etc = Etc::new(&files);
        let error = ClientSettings::from(&etc.load("a.example.org")).unwrap_err().to_string();
        assert!(error.contains("a.example.org.local:2: ") && error.contains(bad), "{error}");
    }
}

#[test]
fn row_70_a_file_that_is_far_too_large_or_a_pipe_is_refused_at_once() {
    let etc = Etc::new(&[]);
    let file = std::fs::File::create(etc.0.path().join("default.conf")).unwrap();
    file.set_len(10 << 20).unwrap();
    let error = Config::load("a.example.org", &etc.sources()).unwrap_err().to_string();
    assert!(error.contains("default.conf is larger than 1048576 bytes"), "{error}");
    let etc = Etc::new(&[]);
    let pipe = etc.0.path().join("default.local");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let error = Config::load("a.example.org", &etc.sources()).unwrap_err().to_string();
    assert!(error.contains("default.local: not a regular file"), "{error}");
}

#[test]
fn row_70_files_that_include_each_other_end() {
    let etc = Etc::new(&[
        ("default.conf", ". a.conf\n. a.conf\nEND=yes\n"),
        ("a.conf", ". b.conf\n. b.conf\n. b.conf\n"),
        ("b.conf", ". c.conf\n. c.conf\n. c.conf\n. a.conf\n"),
        ("c.conf", ". d.conf\n. d.conf\n. d.conf\n. d.conf\n"),
        ("d.conf", ". e.conf\n. e.conf\n. e.conf\n. e.conf\n"),
        ("e.conf", "X=$X.\n"),
    ]);
    let config = etc.load("a.example.org");
    assert_eq!(value(&config, "END"), Some("yes"));
    assert!(value(&config, "X").unwrap().len() <= 256);
    assert!(config.notices().iter().any(|notice| notice.message.contains("includes itself")));
    assert!(config.notices().iter().any(|notice| notice.message.contains("too many files")));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn row_70_no_file_makes_the_configuration_panic(text in "(\\PC{0,40}\n){0,20}") {
        let etc = Etc::new(&[("default.local", &text)]);
        if let Ok(config) = Config::load("a.example.org", &etc.sources()) {
            let _ = ClientSettings::from(&config);
        }
    }
}
