//! A real Docker engine with the program as its legacy plugin: the verbs that users type, normal images.

mod engine;

use engine::Engine;
use testkit::tar::TarBuilder;

#[test]
fn an_image_is_imported_run_changed_committed_saved_and_removed() {
    let engine = Engine::start();
    engine.import_busybox("base:1");
    assert_eq!(engine.docker.run(&["base:1", "/bin/echo", "hello"]).unwrap(), "hello");

    let work = "echo new >/new; mkdir /d; echo x >/d/f; rm /bin/id; sleep 1000";
    engine.docker(&["run", "-d", "--network=host", "--name", "first", "base:1", "/bin/sh", "-c", work]);
    engine.wait_for(&["exec", "first", "/bin/cat", "/d/f"], "x");
    engine.docker(&["exec", "first", "/bin/touch", "/touched"]);
    assert_eq!(engine.docker(&["diff", "first"]), "C /bin\nD /bin/id\nA /d\nA /d/f\nA /new\nA /touched");
    assert!(engine.docker(&["ps", "-s", "--format", "{{.Size}}"]).starts_with("6B"));
    let copied = engine.directory.path().join("copied");
    engine.docker(&["cp", "first:/d", copied.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(copied.join("f")).unwrap(), "x\n");
    std::fs::write(copied.join("f"), "from outside\n").unwrap();
    engine.docker(&["cp", copied.join("f").to_str().unwrap(), "first:/d/g"]);

    engine.docker(&["commit", "first", "base:2"]);
    engine.docker(&["rm", "-f", "first"]);
    assert_eq!(engine.docker.run(&["base:2", "/bin/cat", "/new", "/d/g"]).unwrap(), "new\nfrom outside");
    assert!(
        engine.docker.run_output(&["base:2", "/bin/id"]).unwrap().code() != Some(0),
        "the whiteout holds"
    );
    let data = engine.docker(&[
        "inspect",
        "--format",
        "{{.GraphDriver.Name}} {{.GraphDriver.Data.UpperDir}}",
        "base:2",
    ]);
    assert!(data.starts_with(&engine.name) && data.ends_with("/diff"), "{data}");

    let saved = engine.directory.path().join("saved.tar");
    engine.docker(&["save", "-o", saved.to_str().unwrap(), "base:2"]);
    engine.docker(&["rmi", "base:2"]);
    engine.docker(&["rmi", "base:1"]);
    assert!(engine.layers().is_empty(), "{:?}", engine.layers());
    engine.docker(&["load", "-i", saved.to_str().unwrap()]);
    assert_eq!(engine.docker.run(&["base:2", "/bin/cat", "/new"]).unwrap(), "new");
    engine.assert_nothing_mounted();
}

#[test]
fn containers_run_again_after_restarts_of_engine_and_plugin_in_any_order() {
    let mut engine = Engine::start();
    engine.import_busybox("base:1");
    engine.docker(&[
        "create",
        "--network=host",
        "--name",
        "first",
        "base:1",
        "/bin/sh",
        "-c",
        "echo x >>/log; cat /log",
    ]);
    let start = |engine: &Engine| engine.docker(&["start", "-a", "first"]);
    assert_eq!(start(&engine), "x");
    engine.docker.restart().unwrap();
    assert_eq!(start(&engine), "x\nx");
    engine.kill_plugin();
    assert_eq!(start(&engine), "x\nx\nx", "the engine does not repeat Init");
    engine.docker.stop();
    engine.kill_plugin();
    engine.docker.start().unwrap();
    assert_eq!(start(&engine), "x\nx\nx\nx");

    engine.docker(&["run", "-d", "--network=host", "--name", "second", "base:1", "/bin/sleep", "1000"]);
    engine.kill_plugin();
    assert_eq!(
        engine.docker(&["exec", "second", "/bin/echo", "alive"]),
        "alive",
        "mounts outlive the plugin"
    );
    engine.docker(&["cp", "second:/bin/busybox", engine.directory.path().to_str().unwrap()]);
    engine.docker(&["rm", "-f", "second"]);
    engine.assert_nothing_mounted();

    // Both are killed with a running container: the engine puts what it never got.
    engine.docker(&["run", "-d", "--network=host", "--name", "third", "base:1", "/bin/sleep", "1000"]);
    engine.docker.kill();
    engine.kill_plugin();
    engine.forget_containerd();
    engine.docker.start().unwrap();
    engine.docker(&["rm", "-f", "third"]);
    assert_eq!(start(&engine), "x\nx\nx\nx\nx");
    engine.assert_nothing_mounted();
}

#[test]
fn both_builders_build_on_it() {
    let engine = Engine::start();
    engine.import_busybox("base:1");
    let context = engine.directory.path().join("context");
    std::fs::create_dir(&context).unwrap();
    let dockerfile = "FROM base:1\nCOPY copied /copied\nRUN [\"/bin/sh\", \"-c\", \"echo run >/run.txt; rm /copied\"]\n\
                      ENV A=b\nCMD [\"/bin/cat\", \"/run.txt\"]\n";
    std::fs::write(context.join("Dockerfile"), dockerfile).unwrap();
    std::fs::write(context.join("copied"), vec![7; 70 << 20]).unwrap();
    for buildkit in ["0", "1"] {
        let image = format!("built:{buildkit}");
        let mut build = engine.docker.docker_command(&["build", "--network=host", "-t", &image]);
        build.arg(&context).env("DOCKER_BUILDKIT", buildkit);
        testkit::process::run(build, std::time::Duration::from_secs(120)).unwrap().success().unwrap();
        assert_eq!(engine.docker.run(&[&image]).unwrap(), "run");
        assert!(engine.docker.run_output(&[&image, "/bin/cat", "/copied"]).unwrap().code() != Some(0));
        let saved = engine.directory.path().join("saved.tar");
        engine.docker(&["save", "-o", saved.to_str().unwrap(), &image]);
    }
    engine.docker(&["rmi", "built:0", "built:1"]);
    engine.docker(&["builder", "prune", "-af"]);
    engine.assert_nothing_mounted();
}

#[test]
fn a_layer_with_everything_a_tar_can_hold_survives_save_and_load() {
    let engine = Engine::start();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(150));
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let layer = testkit::image::busybox_layer()
        .unwrap()
        .directory("opaque/", 0o755)
        .file("opaque/below", 0o644, b"below")
        .file(&long, 0o640, b"long")
        .file("setuid", 0o4755, b"s")
        .hard_link("second-name", "setuid")
        .fifo("fifo", 0o600)
        .char_device("null", 0o666, (1, 3))
        .xattr("security.capability", &capability)
        .file("capable", 0o755, b"c")
        .finish();
    let top = TarBuilder::new()
        .file("opaque/.wh..wh..opq", 0o600, b"")
        .file("opaque/above", 0o644, b"above")
        .file("bin/.wh.id", 0o600, b"")
        .finish();
    let archive = engine.directory.path().join("image.tar");
    testkit::Image::new([layer, top]).write_docker_archive(&archive, "corner:1").unwrap();
    engine.docker(&["load", "-i", archive.to_str().unwrap()]);
    let look = "ls /opaque; stat -c %a /setuid; stat -c %h /second-name; stat -c %t,%T /null; ls /bin/id";
    let expected = "above\n4755\n2\n1,3";
    let seen = engine.docker.run_output(&["corner:1", "/bin/sh", "-c", look]).unwrap();
    assert_eq!(seen.stdout.trim(), expected);
    let saved = engine.directory.path().join("saved.tar");
    engine.docker(&["save", "-o", saved.to_str().unwrap(), "corner:1"]);
    engine.docker(&["rmi", "corner:1"]);
    engine.docker(&["load", "-i", saved.to_str().unwrap()]);
    engine.assert_nothing_mounted();
}
