//! Identities on disk: complete or refused, private where they must be.

use super::*;
use crate::clock::{Clock, SystemClock};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

fn site(dir: &Path) -> SiteIdentity {
    SiteIdentity::create(dir, "dr-east", &["dr.example.org".into(), "192.0.2.7".into()], &SystemClock)
        .unwrap()
}

#[test]
fn a_site_comes_back_from_its_directory_and_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let made = site(dir.path());
    let loaded = SiteIdentity::load(dir.path()).unwrap();
    assert_eq!(made.fingerprint(), loaded.fingerprint());
    assert_eq!(
        (loaded.name(), loaded.addresses()),
        ("dr-east", &["dr.example.org".into(), "192.0.2.7".into()][..])
    );
    let years = (loaded.authority_expires().0 - SystemClock.now().0) as f64 / (365.25 * 86_400_000.0);
    assert!((9.9..10.1).contains(&years), "{years}");
    assert!(loaded.expires() < loaded.authority_expires());
    let again = SiteIdentity::create(dir.path(), "other", &["a.example".into()], &SystemClock);
    assert!(matches!(again, Err(PkiError::Exists { .. })));
    assert_eq!(SiteIdentity::load(dir.path()).unwrap().fingerprint(), made.fingerprint());
}

#[test]
fn keys_are_readable_by_their_owner_only_and_no_drafts_stay_behind() {
    let dir = tempfile::tempdir().unwrap();
    site(dir.path());
    let mut names = Vec::new();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.ends_with(".key") {
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{name}");
        }
        names.push(name);
    }
    names.sort();
    assert_eq!(names, ["ca.key", "ca.pem", "site.key", "site.pem"]);
}

#[test]
fn missing_and_damaged_files_are_named_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let error = SiteIdentity::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("ca.pem") && error.contains("init"), "{error}");
    let error = AgentIdentity::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("agent.pem") && error.contains("enrol"), "{error}");
    site(dir.path());
    let other = tempfile::tempdir().unwrap();
    site(other.path());
    fs::copy(other.path().join("site.key"), dir.path().join("site.key")).unwrap();
    let error = SiteIdentity::load(dir.path()).unwrap_err();
    assert!(matches!(&error, PkiError::Damaged { path, .. } if path.ends_with("site.key")), "{error}");
    fs::write(dir.path().join("ca.pem"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .unwrap();
    let error = SiteIdentity::load(dir.path()).unwrap_err();
    assert!(matches!(&error, PkiError::Damaged { path, .. } if path.ends_with("ca.pem")), "{error}");
}

#[test]
fn of_a_request_only_the_key_counts() {
    let dir = tempfile::tempdir().unwrap();
    let site = site(dir.path());
    let asked: AgentName = "wishes-to-be".parse().unwrap();
    let granted: AgentName = "host-a".parse().unwrap();
    let request = AgentKey::generate(&asked).unwrap().request().unwrap();
    let issue = |request: &[u8]| site.issue_agent(&granted, request, Duration::from_secs(60), &SystemClock);
    let (one, two) = (issue(&request).unwrap(), issue(&request).unwrap());
    assert_eq!(Facts::read(&one).unwrap().common_name, "host-a");
    assert_ne!(one, two, "serial numbers must differ");
    let mut forged = request.clone();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    assert!(matches!(issue(&forged), Err(PkiError::BadRequest(_))));
    for len in 0..request.len() {
        assert!(issue(&request[..len]).is_err());
    }
}

#[test]
fn names_that_could_do_harm_and_addresses_nobody_can_reach_are_refused() {
    for bad in ["", "-x", "a/b", "a b", "über", "a\nb", &"x".repeat(64)] {
        assert!(bad.parse::<AgentName>().is_err(), "{bad:?}");
    }
    assert!("host-1.example".parse::<AgentName>().is_ok());
    let dir = tempfile::tempdir().unwrap();
    for bad in ["0.0.0.0", "::", "not a name", "host:4800", ""] {
        let made = SiteIdentity::create(&dir.path().join("s"), "s", &[bad.into()], &SystemClock);
        assert!(matches!(made, Err(PkiError::BadName { .. })), "{bad:?}");
    }
    assert!(SiteIdentity::create(&dir.path().join("s"), "s", &[], &SystemClock).is_err());
}

#[test]
fn a_fingerprint_comes_back_from_what_it_prints() {
    let dir = tempfile::tempdir().unwrap();
    let fingerprint = site(dir.path()).fingerprint();
    let text = fingerprint.to_string();
    assert!(text.starts_with("sha256:") && text.len() == 7 + 64, "{text}");
    assert_eq!(text.parse::<Fingerprint>().unwrap(), fingerprint);
    assert!(text[..70].parse::<Fingerprint>().is_err());
    assert!("sha256:zz".parse::<Fingerprint>().is_err());
}
