//! What is asked, against the real qemu-guest-agent on a socket; and that no answer does harm.
//! The real one runs on this very machine, so that it is forbidden to set the clock and to freeze.

use super::*;
use proptest::prelude::*;
use std::{
    cell::RefCell,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
};

struct Socket(RefCell<BufReader<UnixStream>>);

impl Socket {
    fn connect(path: &Path) -> Self {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Self(RefCell::new(BufReader::new(stream))),
                Err(error) if Instant::now() > until => panic!("qemu-ga did not listen: {error}"),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl AgentChannel for Socket {
    fn ask(&self, request: &str, within: Duration) -> Result<String, String> {
        let mut stream = self.0.borrow_mut();
        stream.get_ref().set_read_timeout(Some(within)).unwrap();
        stream.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).map_err(|error| error.to_string())?;
        Ok(line)
    }
}

struct Real(Child, tempfile::TempDir);

impl Real {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let forbidden = "guest-set-time,guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-shutdown";
        let child = Command::new("/usr/sbin/qemu-ga")
            .args(["-m", "unix-listen", "-b", forbidden, "-p"])
            .arg(dir.path().join("ga.sock"))
            .arg("-f")
            .arg(dir.path().join("ga.pid"))
            .arg("-t")
            .arg(dir.path())
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-guest-agent is among the packages that tests/setup.sh installs");
        Self(child, dir)
    }

    fn agent(&self) -> GuestAgent<Socket> {
        GuestAgent::new(Socket::connect(&self.1.path().join("ga.sock")))
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_real_agent_understands_what_is_asked_and_is_understood() {
    let real = Real::start();
    let agent = real.agent();
    agent.ping(ANSWER_WITHIN).unwrap();
    assert_eq!((agent.is_frozen(), agent.thaw()), (Ok(false), Ok(0)));
    let forbidden = agent.freeze(ANSWER_WITHIN);
    assert!(matches!(forbidden, Err(AgentError::Refused { .. })), "{forbidden:?}");
    assert!(agent.time().unwrap() > UnixMs(1_600_000_000_000));
    let shell = |script: &str| agent.run("/bin/sh", &["-c".into(), script.into()], Duration::from_secs(20));
    assert_eq!(shell("sleep 0.1; exit 0"), Ok(ProgramEnd::Exited(0)));
    assert_eq!(shell("exit 7"), Ok(ProgramEnd::Exited(7)));
    assert_eq!(shell("kill -9 $$"), Ok(ProgramEnd::Killed(9)));
    let told = agent.interfaces().unwrap();
    let lo = told.iter().find(|interface| interface.name == "lo").expect("this machine has one");
    assert!(lo.mac.is_none() && lo.addresses.contains(&"127.0.0.1/8".parse().unwrap()), "{lo:?}");
    assert_eq!(agent.is_windows(), Ok(false));
    let missing = agent.run("/nowhere/to/be/found", &[], ANSWER_WITHIN);
    assert!(matches!(missing, Err(AgentError::Refused { command: "guest-exec", .. })), "{missing:?}");
    let long = agent.run("/bin/sleep", &["2".into()], Duration::from_millis(100));
    assert!(matches!(long, Err(AgentError::Unfinished { .. })), "{long:?}");
    let forbidden = agent.set_time(UnixMs(1));
    assert!(matches!(forbidden, Err(AgentError::Refused { .. })), "{forbidden:?}");
    agent.ping(ANSWER_WITHIN).unwrap();
}

/// Answers all the same.
struct Parrot(String);

impl AgentChannel for Parrot {
    fn ask(&self, _request: &str, _within: Duration) -> Result<String, String> {
        Ok(self.0.clone())
    }
}

#[test]
fn a_guest_s_words_reach_a_terminal_without_control_characters_and_short() {
    let words = format!("\\u001b[31m{}", "x".repeat(1000));
    let parrot = Parrot(format!(r#"{{"error":{{"class":"GenericError","desc":"{words}"}}}}"#));
    let Err(AgentError::Refused { why, .. }) = GuestAgent::new(parrot).ping(ANSWER_WITHIN) else { panic!() };
    assert!(why.starts_with("[31mx") && why.len() == WORDS_MAX);
}

#[test]
fn an_answer_that_is_too_long_or_nested_too_deep_is_refused() {
    for answer in [format!("{{\"return\":\"{}\"}}", "a".repeat(ANSWER_MAX)), "[".repeat(100_000)] {
        let heard = GuestAgent::new(Parrot(answer)).ping(ANSWER_WITHIN);
        assert_eq!(heard, Err(AgentError::Unexpected { command: "guest-ping" }));
    }
}

proptest! {
    #[test]
    fn whatever_a_guest_answers_is_an_answer_or_an_error(
        text in "\\PC{0,60}",
        number in any::<i64>(),
        shape in 0..6,
    ) {
        let answer = match shape {
            0 => text,
            1 => format!(r#"{{"return":{number}}}"#),
            2 => format!(r#"{{"return":{{"exited":true,"pid":{number}}}}}"#),
            3 => format!(r#"{{"return":{{"exited":true,"pid":1,"signal":{number}}}}}"#),
            4 => r#"{"error":7}"#.to_owned(),
            _ => r#"{"return":null}"#.to_owned(),
        };
        let agent = GuestAgent::new(Parrot(answer));
        let _ = (agent.freeze(ANSWER_WITHIN), agent.thaw());
        let _ = (agent.ping(ANSWER_WITHIN), agent.time(), agent.is_frozen(), agent.set_time(UnixMs(u64::MAX)));
        let _ = (agent.interfaces(), agent.is_windows());
        let _ = agent.run("/x", &[], Duration::ZERO);
    }
}
