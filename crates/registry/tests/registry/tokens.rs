//! A real registry that takes nothing but the tokens of its token service: the flow of Docker Hub.

use registry::{Client, ClientSettings, Credential, Credentials, Platform, Reference, RegistryError, Secret};
use testkit::Image;
use testkit::tar::TarBuilder;
use testkit::token_server::{IDENTITY_TOKEN, PASSWORD, TokenRegistry, USER};

use crate::docker_registry::push;

fn client(registry: &TokenRegistry, credential: Option<Credential>) -> Client {
    let credentials = match credential {
        Some(credential) => Credentials::none().with(registry.address(), credential),
        None => Credentials::none(),
    };
    Client::new(ClientSettings { credentials, ..ClientSettings::default() }).unwrap()
}

fn password(text: &str) -> Option<Credential> {
    Some(Credential::Password { user: USER.into(), password: Secret::new(text) })
}

#[test]
fn tokens_are_asked_for_with_the_rights_that_are_needed() {
    let registry = TokenRegistry::start().unwrap();
    let reference = |name: &str| format!("{}/{name}:1", registry.address()).parse::<Reference>().unwrap();
    let tar = TarBuilder::new().file("x", 0o644, b"x").finish();
    let blob = Image::new([tar.clone()]).layers.remove(0).blob;
    let host = Platform::host();

    let user = client(&registry, password(PASSWORD));
    for name in ["public/app", "private/app"] {
        push(&user, &reference(name), &blob, &tar).unwrap();
    }
    let found = user.source(&reference("private/app")).image(&host).unwrap();
    user.blob(&reference("private/app"), &found.manifest.layers[0]).unwrap();
    let asked = registry.asked();
    let once = ["public/app:pull,push", "private/app:pull,push", "private/app:pull"];
    assert_eq!(asked, once.map(|scope| format!("GET repository:{scope}")), "each once");

    // An identity token does the same.
    let identity = client(&registry, Some(Credential::IdentityToken(Secret::new(IDENTITY_TOKEN))));
    identity.source(&reference("private/app")).image(&host).unwrap();
    assert!(registry.asked().iter().any(|asked| asked.starts_with("POST ")));

    // Nobody in particular may read what is public, and nothing more.
    let anonymous = client(&registry, None);
    anonymous.source(&reference("public/app")).image(&host).unwrap();
    let error = anonymous.source(&reference("private/app")).image(&host).unwrap_err();
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    let error = anonymous.check_push(&reference("public/app")).unwrap_err();
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");

    // A wrong login is an error that does not show it, also for what is public.
    let wrong = client(&registry, password("wrong-password"));
    let error = wrong.source(&reference("public/app")).image(&host).unwrap_err();
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    assert!(!format!("{error} {error:?}").contains("wrong-password"));
}
