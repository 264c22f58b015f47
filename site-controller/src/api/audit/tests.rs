//! What is written down of calls, and what is left of it after the worst.

use super::*;
use crate::api::{caller::Who, role::Role};
use lifeboat::clock::ManualClock;
use std::{io::Write, os::unix::fs::PermissionsExt, path::Path};

fn log(dir: &Path, clock: &ManualClock) -> Arc<AuditLog> {
    Arc::new(AuditLog::open(dir, Arc::new(clock.clone())).unwrap())
}

fn caller() -> Caller {
    Caller {
        who: Who::Token { name: "alice".into(), id: "abc".into() },
        role: Role::Operator,
        origin: Origin::Network { from: "10.0.0.9:5".parse().unwrap() },
    }
}

fn call(body: &str) -> Call {
    Call {
        method: "POST".into(),
        route: "/v1/vms/{vm}/prune".into(),
        path: "/v1/vms/web/prune".into(),
        body: body.into(),
    }
}

fn error() -> ErrorBody {
    ErrorBody { code: "conflict".into(), what: "no".into(), why: None, what_to_do: None }
}

#[tokio::test]
async fn a_call_is_on_disk_before_it_acts_and_its_end_when_it_has_ended() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), ManualClock::default());
    let log = log(dir.path(), &clock);
    let outcome = log.begin(&caller(), call(r#"{"point":"latest"}"#)).await.unwrap();
    // As somebody else reads it, or the next controller.
    let row = || super::tests::log(dir.path(), &clock).read(UnixMs(0), 10).unwrap().pop().unwrap();
    let begun = row();
    assert_eq!((begun.who.as_str(), begun.from.as_str()), ("token alice (abc)", "10.0.0.9:5"));
    assert_eq!((begun.path.as_str(), begun.end), ("/v1/vms/web/prune", None));
    assert_eq!(begun.request.unwrap()["point"], "latest");
    clock.advance(7);
    let later = outcome.clone().later();
    outcome.answered(None).await;
    assert_eq!(row().end, None, "the answer is not the end of it");
    later.ended(Some(&error())).await;
    let end = row().end.unwrap();
    assert_eq!((end.at, end.done, end.code.as_deref()), (UnixMs(7), false, Some("conflict")));
    log.refused(&caller(), call(""), &error()).await.unwrap();
    assert_eq!((row().request, row().end.unwrap().done), (None, false));
    let mode = fs::metadata(dir.path().join(NAME)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_torn_line_costs_nothing_but_itself() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), ManualClock::default());
    log(dir.path(), &clock).begin(&caller(), call("")).await.unwrap().answered(None).await;
    let mut file = File::options().append(true).open(dir.path().join(NAME)).unwrap();
    file.write_all(b"{\"call\":{\"id\":\"to").unwrap();
    let again = log(dir.path(), &clock);
    again.begin(&caller(), call("")).await.unwrap();
    let rows = again.read(UnixMs(0), 10).unwrap();
    assert_eq!(rows.iter().map(|row| row.end.is_some()).collect::<Vec<_>>(), [true, false]);
}

#[tokio::test]
async fn the_log_is_bounded_and_the_newest_calls_are_found_across_its_files() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), ManualClock::default());
    let mut log = AuditLog::open(dir.path(), Arc::new(clock.clone())).unwrap();
    log.file_max = 2000;
    let log = Arc::new(log);
    for _ in 0..200 {
        clock.advance(1);
        log.begin(&caller(), call("")).await.unwrap().answered(None).await;
    }
    let files: Vec<u64> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).collect();
    assert!(files.len() == FILES && files.iter().all(|len| *len <= 2000), "{files:?}");
    let newest = log.read(UnixMs(0), 5).unwrap();
    assert_eq!(newest.iter().map(|row| row.at.0).collect::<Vec<_>>(), [196, 197, 198, 199, 200]);
    assert!(newest.iter().all(|row| row.end.as_ref().is_some_and(|end| end.done)));
    assert_eq!(log.read(UnixMs(199), 5).unwrap().len(), 2);
}

#[tokio::test]
async fn a_call_that_cannot_be_written_down_is_an_error() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), ManualClock::default());
    let mut log = AuditLog::open(dir.path(), Arc::new(clock)).unwrap();
    // The oldest file's place is taken by a folder.
    log.file_max = 1;
    let log = Arc::new(log);
    log.begin(&caller(), call("")).await.unwrap();
    fs::create_dir(dir.path().join(format!("{NAME}.{}", FILES - 1))).unwrap();
    fs::write(dir.path().join(format!("{NAME}.{}", FILES - 2)), "").unwrap();
    assert!(log.begin(&caller(), call("")).await.is_err());
}
