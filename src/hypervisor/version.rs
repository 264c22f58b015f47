//! QEMU's version, as its monitor, libvirt and a recovery point tell it.
//! Promises: pure but for [`QemuVersion::ask`], which asks the QEMU that runs a guest: not the one that is installed.
//! Called by the agent's capture, and by the site's failover.

use super::monitor::{Monitor, MonitorError};
use serde_json::{Value, json};
use std::{fmt, str::FromStr};

/// Ordered as releases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuVersion {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a version of QEMU's")]
pub struct NoVersion;

impl QemuVersion {
    pub const fn new(major: u32, minor: u32, micro: u32) -> Self {
        Self { major, minor, micro }
    }

    /// Of the process that runs the guest (QMP `query-version`).
    pub fn ask(monitor: &dyn Monitor) -> Result<Self, MonitorError> {
        const COMMAND: &str = "query-version";
        let answer = monitor.execute(COMMAND, json!({}))?;
        let part = |name: &str| u32::try_from(answer["qemu"][name].as_u64()?).ok();
        let version = || Some(Self::new(part("major")?, part("minor")?, part("micro")?));
        version().ok_or_else(|| MonitorError::Unexpected {
            command: COMMAND.into(),
            what: answer.get("qemu").unwrap_or(&Value::Null).to_string(),
        })
    }

    /// From libvirt's number: major * 1,000,000 + minor * 1,000 + micro (`virConnectGetVersion`).
    pub const fn of_libvirt(number: u32) -> Self {
        Self::new(number / 1_000_000, number / 1000 % 1000, number % 1000)
    }

    /// Whether it is of an earlier series of releases. Within one, state goes both ways.
    pub const fn is_before(self, other: Self) -> bool {
        self.major < other.major || (self.major == other.major && self.minor < other.minor)
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl FromStr for QemuVersion {
    type Err = NoVersion;

    /// Takes what [`fmt::Display`] writes, and nothing else.
    fn from_str(text: &str) -> Result<Self, NoVersion> {
        let mut parts = text.split('.').map(|part| part.parse().map_err(|_| NoVersion));
        let mut part = || parts.next().ok_or(NoVersion)?;
        let version = Self::new(part()?, part()?, part()?);
        if version.to_string() == text { Ok(version) } else { Err(NoVersion) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::BorrowedFd;

    struct Says(Value);

    impl Monitor for Says {
        fn execute_with_fds(&self, _: &str, _: Value, _: &[BorrowedFd<'_>]) -> Result<Value, MonitorError> {
            Ok(self.0.clone())
        }
    }

    #[test]
    fn a_version_is_read_as_qemu_and_libvirt_tell_it_and_what_is_none_is_refused() {
        // What Debian's QEMU 7.2 answers.
        let said = json!({ "qemu": { "micro": 22, "minor": 2, "major": 7 }, "package": "Debian 1:7.2+dfsg-7+deb12u18" });
        let known = QemuVersion::new(7, 2, 22);
        assert_eq!(QemuVersion::ask(&Says(said)), Ok(known));
        for wrong in [json!({}), json!({ "qemu": { "micro": -1, "minor": 2, "major": 7 } }), json!([])] {
            assert!(QemuVersion::ask(&Says(wrong.clone())).is_err(), "{wrong}");
        }
        assert_eq!(QemuVersion::of_libvirt(7_002_022), known);
        assert_eq!("7.2.22".parse(), Ok(known));
        for wrong in ["", "7", "7.2", "7.2.22.1", "7.2.22 ", "07.2.22", "+7.2.22", "7.2.4294967296", "a.b.c"]
        {
            assert_eq!(wrong.parse::<QemuVersion>(), Err(NoVersion), "{wrong}");
        }
    }

    #[test]
    fn releases_of_one_series_are_alike_and_an_earlier_series_is_before() {
        let [old, fixed, new, next] = [(7, 2, 0), (7, 2, 22), (8, 0, 0), (10, 0, 2)]
            .map(|(major, minor, micro)| QemuVersion::new(major, minor, micro));
        assert!(!old.is_before(fixed) && !fixed.is_before(old) && old < fixed);
        assert!(old.is_before(new) && fixed.is_before(next) && new.is_before(next));
        assert!(!next.is_before(new) && !new.is_before(fixed));
        assert!(new.is_before(QemuVersion::new(8, 1, 0)));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(major: u32, minor: u32, micro: u32) {
            let version = QemuVersion::new(major, minor, micro);
            prop_assert_eq!(version.to_string().parse(), Ok(version));
        }
    }
}
