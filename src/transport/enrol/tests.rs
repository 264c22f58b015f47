//! Enrolment over real QUIC: the good way, and every way it must not go.

use super::*;
use crate::{
    clock::{Clock, ManualClock, SystemClock},
    transport::{
        EnrolConnection, Incoming, RefusalCode, TransportError, TransportSettings, dial,
        pki::{AGENT_VALIDITY, AgentIdentity, AgentName, Fingerprint},
        tests::{Rig, within},
    },
};
use std::{path::Path, sync::Arc, time::Duration};

fn book(rig: &Rig, clock: Arc<dyn Clock>) -> EnrolmentTokens {
    EnrolmentTokens::open(&rig.dir.path().join("site"), rig.site.fingerprint(), clock)
}

fn name(name: &str) -> AgentName {
    name.parse().unwrap()
}

async fn knock(rig: &mut Rig) -> EnrolConnection {
    match within(rig.endpoint.accept()).await.unwrap() {
        Incoming::Enrolment(connection) => connection,
        Incoming::Agent { .. } => panic!("an enrolment was expected"),
    }
}

/// One enrolment, both halves; what each of them made of it.
async fn attempt(
    rig: &mut Rig,
    tokens: &EnrolmentTokens,
    token: &EnrolmentToken,
    agent: &str,
    dir: &Path,
) -> (Result<AgentIdentity, TransportError>, Result<Enrolled, TransportError>) {
    let (agent, address, settings) = (name(agent), rig.address.clone(), TransportSettings::default());
    let agent_side = enrol(&address, token, &agent, dir, &settings);
    let site_side = async {
        let connection = knock(rig).await;
        serve(connection, &rig.site, tokens, AGENT_VALIDITY, &SystemClock).await
    };
    within(async { tokio::join!(agent_side, site_side) }).await
}

fn refused_with(result: Result<AgentIdentity, TransportError>) -> RefusalCode {
    match result {
        Err(TransportError::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_token_buys_one_identity_that_gets_in_and_then_is_spent() {
    let mut rig = Rig::new();
    let tokens = book(&rig, Arc::new(SystemClock));
    let issued = tokens.issue(EnrolmentTokens::VALIDITY, None).unwrap();
    let pasted: EnrolmentToken = issued.token.to_string().parse().unwrap();
    let dir = rig.dir.path().join("host-a");
    let (agent, site) = attempt(&mut rig, &tokens, &pasted, "host-a", &dir).await;
    let (agent, enrolled) = (agent.unwrap(), site.unwrap());
    assert_eq!((agent.name().as_str(), enrolled.agent.as_str()), ("host-a", "host-a"));
    assert_eq!(agent.fingerprint(), enrolled.fingerprint);
    assert_eq!(agent.site_fingerprint(), rig.site.fingerprint());

    let loaded = AgentIdentity::load(&dir).unwrap();
    let dialled = within(dial(&rig.address, &loaded, &TransportSettings::default())).await.unwrap();
    assert!(matches!(rig.endpoint.accept().await, Some(Incoming::Agent { .. })));
    drop(dialled);

    let other = rig.dir.path().join("host-b");
    let (agent, site) = attempt(&mut rig, &tokens, &pasted, "host-b", &other).await;
    assert_eq!(refused_with(agent), RefusalCode::TOKEN_USED);
    assert!(site.is_err());
    assert!(!other.exists(), "a refused agent stores nothing");
    let listed = tokens.list().unwrap();
    assert_eq!(listed[0].used_by, Some(name("host-a")));
    let stored = std::fs::read_to_string(rig.dir.path().join("site/enrolment-tokens.json")).unwrap();
    assert!(!stored.contains(&format!("{:?}", pasted.secret)), "only a digest is stored");
}

#[tokio::test]
async fn unknown_expired_and_misnamed_tokens_are_refused_each_with_its_reason() {
    let mut rig = Rig::new();
    let clock = ManualClock::at(SystemClock.now());
    let tokens = book(&rig, Arc::new(clock.clone()));
    let dir = rig.dir.path().join("nobody");
    let issued = tokens.issue(Duration::from_secs(60), Some(name("host-a"))).unwrap();

    let guess = EnrolmentToken { secret: [9; 16], ..issued.token.clone() };
    let (agent, _) = attempt(&mut rig, &tokens, &guess, "host-a", &dir).await;
    assert_eq!(refused_with(agent), RefusalCode::TOKEN_UNKNOWN);
    let (agent, _) = attempt(&mut rig, &tokens, &issued.token, "host-b", &dir).await;
    assert_eq!(refused_with(agent), RefusalCode::TOKEN_OTHER_NAME);
    clock.advance(60_000);
    let (agent, _) = attempt(&mut rig, &tokens, &issued.token, "host-a", &dir).await;
    assert_eq!(refused_with(agent), RefusalCode::TOKEN_EXPIRED);
    assert!(!dir.exists());
    assert_eq!(tokens.list().unwrap()[0].used_at, None);
}

#[tokio::test]
async fn a_site_with_another_authority_never_sees_the_secret() {
    let mut rig = Rig::new();
    let tokens = book(&rig, Arc::new(SystemClock));
    let mut token = tokens.issue(EnrolmentTokens::VALIDITY, None).unwrap().token;
    token.authority = Fingerprint::from_bytes([3; 32]);
    let dir = rig.dir.path().join("nobody");
    let settings = TransportSettings::default();
    let error = within(enrol(&rig.address, &token, &name("host-a"), &dir, &settings)).await.unwrap_err();
    assert!(matches!(error, TransportError::Certificate { .. }), "{error}");
    assert!(!dir.exists());
    // What comes through next is a good one: the impostor's handshake never got that far.
    let good = tokens.issue(EnrolmentTokens::VALIDITY, None).unwrap().token;
    let (agent, _) = attempt(&mut rig, &tokens, &good, "host-a", &dir).await;
    agent.unwrap();
}

#[tokio::test]
async fn guessing_is_slowed_down_and_does_not_shut_others_out_for_long() {
    let rig = Rig::new();
    let clock = ManualClock::at(SystemClock.now());
    let tokens = book(&rig, Arc::new(clock.clone()));
    let issued = tokens.issue(EnrolmentTokens::VALIDITY, None).unwrap();
    let (from, elsewhere) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
    let guesses: Vec<_> = (0..10).map(|at| tokens.redeem(&[at; 16], &name("x"), from).unwrap_err()).collect();
    assert!(matches!(guesses[4], TokenRefusal::Unknown) && matches!(guesses[5], TokenRefusal::TooMany));
    assert!(matches!(tokens.redeem(&issued.token.secret, &name("x"), from), Err(TokenRefusal::TooMany)));
    assert!(matches!(tokens.redeem(&[1; 16], &name("x"), elsewhere), Err(TokenRefusal::Unknown)));
    clock.advance(60_000);
    tokens.redeem(&issued.token.secret, &name("x"), from).unwrap();
}

#[test]
fn tokens_outlive_the_process_and_a_damaged_book_is_refused_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let open = || EnrolmentTokens::open(dir.path(), Fingerprint::from_bytes([1; 32]), Arc::new(SystemClock));
    let token = open().issue(EnrolmentTokens::VALIDITY, None).unwrap().token;
    open().redeem(&token.secret, &name("host-a"), [127, 0, 0, 1].into()).unwrap();
    let again = open().redeem(&token.secret, &name("host-a"), [127, 0, 0, 1].into());
    assert!(matches!(again, Err(TokenRefusal::Used)));
    std::fs::write(dir.path().join("enrolment-tokens.json"), "{").unwrap();
    assert!(matches!(open().issue(EnrolmentTokens::VALIDITY, None), Err(TokenRefusal::Book(_))));
}
