//! The messages between client and helper: frames of two native 32-bit integers, version and length, and JSON.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::helper::Question;
use super::{Answer, AuthorizationSettings, Credentials, DEFAULT_TTL, Denial, LONGEST_TTL};

/// Version of the protocol.
const VERSION: u32 = 1;
/// Largest message accepted: a proxy certificate with its chain has some ten KiB.
const MAX_MESSAGE: usize = 1 << 20;
/// Bytes of the two integers in front.
pub(super) const HEADER: usize = 8;

const HANDSHAKE: u32 = 0;
const READY: u32 = 1;
const VERIFY: u32 = 2;
const PERMIT: u32 = 3;
const QUIT: u32 = 4;

/// Why what the helper says is not understood. What it said is not repeated: it may be a credential.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("it speaks version {0} of the protocol, not {VERSION}")]
    Version(u32),
    #[error("its message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(u32),
    #[error("its message is not of the expected form")]
    Malformed,
    #[error("it sent message {found} where {expected} was expected")]
    Unexpected { found: u32, expected: u32 },
}

pub(super) fn handshake(fqrn: &str, settings: &AuthorizationSettings) -> Vec<u8> {
    let mut fields = json!({
        "fqrn": fqrn,
        "syslog_facility": settings.syslog_facility,
        "syslog_level": settings.syslog_level,
    });
    if let Some(file) = &settings.debug_log {
        fields["debug_log"] = file.to_string_lossy().into();
    }
    frame(HANDSHAKE, fields)
}

pub(super) fn verify(question: &Question) -> Vec<u8> {
    frame(
        VERIFY,
        json!({
            "uid": question.caller.uid,
            "gid": question.caller.gid,
            "pid": question.caller.pid,
            "membership": BASE64_STANDARD.encode(&question.membership),
        }),
    )
}

pub(super) fn quit() -> Vec<u8> {
    frame(QUIT, json!({}))
}

fn frame(message: u32, mut fields: Value) -> Vec<u8> {
    fields["msgid"] = message.into();
    fields["revision"] = 0.into();
    let text = json!({ "cvmfs_authz_v1": fields }).to_string();
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADER + text.len());
    bytes.extend_from_slice(&VERSION.to_ne_bytes());
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// The length of the message after this header.
pub(super) fn body_length(header: [u8; HEADER]) -> Result<usize, FrameError> {
    let [a, b, c, d, e, f, g, h] = header;
    let (version, length) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    let size = usize::try_from(length).map_err(|_| FrameError::TooLong(length))?;
    if size > MAX_MESSAGE { Err(FrameError::TooLong(length)) } else { Ok(size) }
}

#[derive(Deserialize)]
struct Envelope {
    cvmfs_authz_v1: Message,
}

/// The fields of all answers; those of other messages and unknown ones are ignored.
#[derive(Deserialize)]
struct Message {
    msgid: u32,
    status: Option<u32>,
    ttl: Option<i64>,
    x509_proxy: Option<String>,
    bearer_token: Option<String>,
}

fn parse(body: &[u8], expected: u32) -> Result<Message, FrameError> {
    let envelope: Envelope = serde_json::from_slice(body).map_err(|_| FrameError::Malformed)?;
    let message = envelope.cvmfs_authz_v1;
    if message.msgid != expected {
        return Err(FrameError::Unexpected { found: message.msgid, expected });
    }
    Ok(message)
}

/// The helper is ready.
pub(super) fn ready(body: &[u8]) -> Result<(), FrameError> {
    parse(body, READY).map(drop)
}

/// The helper's answer to a question.
pub(super) fn permit(body: &[u8]) -> Result<Answer, FrameError> {
    let message = parse(body, PERMIT)?;
    let ttl = match message.ttl {
        Some(seconds) => Duration::from_secs(u64::try_from(seconds).unwrap_or(0)).min(LONGEST_TTL),
        None => DEFAULT_TTL,
    };
    let verdict = match message.status.ok_or(FrameError::Malformed)? {
        0 => Ok(credentials(&message)?.map(Arc::new)),
        1 => Err(Denial::NotFound),
        2 => Err(Denial::Invalid),
        3 => Err(Denial::NotMember),
        4 => Err(Denial::NoHelper("it cannot decide this kind of membership".to_owned())),
        status => Err(Denial::Unknown(format!("the helper answered with status {status}"))),
    };
    Ok(Answer { verdict, ttl })
}

fn credentials(message: &Message) -> Result<Option<Credentials>, FrameError> {
    if let Some(proxy) = &message.x509_proxy {
        let proxy = BASE64_STANDARD.decode(proxy).map_err(|_| FrameError::Malformed)?;
        return Ok(Some(Credentials::X509Proxy(proxy)));
    }
    // It becomes a header: anything but printable ASCII would end or forge it.
    match message.bearer_token.as_deref().map(str::trim) {
        Some(token) if token.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Ok(Some(Credentials::Bearer(token.to_owned())))
        }
        Some(_) => Err(FrameError::Malformed),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authz::Caller;

    fn body(text: &str) -> Vec<u8> {
        text.as_bytes().to_vec()
    }

    #[test]
    fn a_question_has_the_form_of_the_protocol() {
        let caller = Caller { uid: 1000, gid: 100, pid: 42 };
        let bytes = verify(&Question { caller, membership: b"/cms\nDN".to_vec() });
        assert_eq!(&bytes[..4], 1_u32.to_ne_bytes());
        let header = bytes[..HEADER].try_into().unwrap();
        assert_eq!(body_length(header).unwrap(), bytes.len() - HEADER);
        let text: Value = serde_json::from_slice(&bytes[HEADER..]).unwrap();
        let expected = json!({"cvmfs_authz_v1": {"msgid": 2, "revision": 0, "uid": 1000, "gid": 100, "pid": 42,
                              "membership": "L2NtcwpETg=="}});
        assert_eq!(text, expected);
    }

    #[test]
    fn answers_are_understood_and_unknown_fields_ignored() {
        let permit =
            |fields: &str| permit(&body(&format!("{{\"cvmfs_authz_v1\": {{\"msgid\": 3, {fields}}}}}")));
        let answer = permit("\"revision\": 0, \"status\": 0, \"ttl\": 7, \"new\": []").unwrap();
        assert_eq!((answer.verdict, answer.ttl), (Ok(None), Duration::from_secs(7)));
        assert_eq!(permit("\"status\": 3").unwrap().verdict, Err(Denial::NotMember));
        assert_eq!(permit("\"status\": 1").unwrap().ttl, DEFAULT_TTL);
        assert_eq!(permit("\"status\": 0, \"ttl\": -5").unwrap().ttl, Duration::ZERO);
        assert_eq!(permit("\"status\": 0, \"ttl\": 99999999999").unwrap().ttl, LONGEST_TTL);
        let proxy = permit("\"status\": 0, \"x509_proxy\": \"cHJveHk=\"").unwrap().verdict.unwrap().unwrap();
        assert_eq!(*proxy, Credentials::X509Proxy(b"proxy".to_vec()));
        assert!(!format!("{proxy:?}").contains("112"), "no content in {proxy:?}");
        let token =
            permit("\"status\": 0, \"bearer_token\": \"a.b.c\\n\"").unwrap().verdict.unwrap().unwrap();
        assert_eq!(*token, Credentials::Bearer("a.b.c".into()));
        assert!(permit("\"status\": 77").unwrap().verdict.is_err());
        for bad in ["\"ttl\": 1", "\"status\": 0, \"bearer_token\": \"a\\r\\nX: y\"", "\"status\": \"0\""] {
            assert_eq!(permit(bad).unwrap_err(), FrameError::Malformed, "{bad}");
        }
    }

    #[test]
    fn messages_that_are_too_long_of_another_version_or_unexpected_are_refused() {
        let header = |version: u32, length: u32| {
            let bytes = [version.to_ne_bytes(), length.to_ne_bytes()].concat();
            body_length(bytes.try_into().unwrap())
        };
        assert_eq!(header(1, 5), Ok(5));
        assert_eq!(header(2, 5), Err(FrameError::Version(2)));
        assert_eq!(header(1, u32::MAX), Err(FrameError::TooLong(u32::MAX)));
        let error = ready(&body("{\"cvmfs_authz_v1\": {\"msgid\": 3}}")).unwrap_err();
        assert_eq!(error, FrameError::Unexpected { found: 3, expected: 1 });
        for bad in ["", "{}", "[1]", "{\"cvmfs_authz_v2\": {\"msgid\": 1}}", "\u{0}"] {
            assert_eq!(ready(&body(bad)), Err(FrameError::Malformed));
        }
    }

    proptest::proptest! {
        #[test]
        fn no_message_makes_the_parser_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = permit(&bytes);
            let _ = ready(&bytes);
        }
    }
}
