//! What a guest with a database says on its serial port, read back; and what such a guest is made of.
//! Owns the meaning of the lines that `tests/guest/database.sh` prints. A torn line is not believed, a line of an error
//! is never passed over. Called by the tests.

use crate::{Console, Guest, GuestSpec, Site, eventually, tail, target_dir};
use anyhow::{Context, Result, ensure};
use std::{collections::HashMap, fs, path::Path, time::Duration};

/// What all balances are together, always: 100 accounts began with as many.
const BALANCES: u64 = 100_000;

/// One check, of one transaction's view: what SQLite says of its file, what the books say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub number: u64,
    pub boot: String,
    pub integrity: String,
    pub rows: u64,
    /// Transfers are numbered from 1 on, without gaps.
    pub newest: u64,
    pub balances: u64,
    /// Accounts whose balance is not what the transfers make it.
    pub wrong: u64,
}

/// All that it has said so far.
#[derive(Clone, Debug, Default)]
pub struct Testimony {
    /// Numbers of transfers, each said after its commit.
    pub commits: Vec<u64>,
    pub checks: Vec<Check>,
    /// Whatever else tells of an error, in the guest's words.
    pub complaints: Vec<String>,
    /// Each boot that said something, once.
    pub boots: Vec<String>,
}

impl Check {
    /// SQLite finds nothing, no transfer is missing, and the books are right.
    pub fn clean(&self) -> bool {
        self.integrity == "ok" && self.rows == self.newest && self.balances == BALANCES && self.wrong == 0
    }
}

impl Testimony {
    pub fn of(console: &Console) -> Self {
        let bytes = fs::read(console.path()).unwrap_or_default();
        Self::parse(&String::from_utf8_lossy(&bytes))
    }

    fn parse(text: &str) -> Self {
        let mut all = Self::default();
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(str::trim) {
            if line.to_lowercase().contains("error") || line.contains("Kernel panic") {
                all.complaints.push(line.to_owned());
            }
            let Some(said) = fields(line) else { continue };
            let number = |key: &str| said.get(key)?.parse::<u64>().ok();
            let text = |key: &str| said.get(key).map(|text| (*text).to_owned());
            let (Some(boot), Some(end)) = (text("boot"), number("end")) else { continue };
            if line.starts_with("commit=") && number("commit") == Some(end) {
                all.commits.push(end);
            } else if let Some(check) = check(&number, &text, &boot).filter(|check| check.number == end) {
                all.checks.push(check);
            } else {
                continue;
            }
            if !all.boots.contains(&boot) {
                all.boots.push(boot);
            }
        }
        all
    }

    pub fn newest_commit(&self) -> u64 {
        self.commits.last().copied().unwrap_or(0)
    }

    /// Nothing that it said tells of any harm.
    pub fn unharmed(&self) -> Result<()> {
        ensure!(self.complaints.is_empty(), "the guest complains: {:?}", self.complaints);
        let unclean: Vec<_> = self.checks.iter().filter(|check| !check.clean()).collect();
        ensure!(unclean.is_empty(), "the database is not whole: {unclean:?}");
        let gap = self.commits.windows(2).find(|pair| pair[1] != pair[0] + 1);
        ensure!(gap.is_none(), "transfers do not follow each other: {gap:?}");
        Ok(())
    }
}

fn fields(line: &str) -> Option<HashMap<&str, &str>> {
    let mut fields = HashMap::new();
    for word in line.split_whitespace() {
        let (key, value) = word.split_once('=')?;
        if fields.insert(key, value).is_some() {
            return None;
        }
    }
    Some(fields)
}

fn check(
    number: &impl Fn(&str) -> Option<u64>,
    text: &impl Fn(&str) -> Option<String>,
    boot: &str,
) -> Option<Check> {
    Some(Check {
        number: number("check")?,
        boot: boot.to_owned(),
        integrity: text("integrity")?,
        rows: number("rows")?,
        newest: number("newest")?,
        balances: number("balances")?,
        wrong: number("wrong")?,
    })
}

/// Waits until all that the guest has said satisfies `wanted`; ends at once when it tells of harm.
pub fn wait(
    guest: &Guest,
    within: Duration,
    what: &str,
    wanted: impl Fn(&Testimony) -> bool,
) -> Result<Testimony> {
    let why = || tail(guest.console().path(), 12);
    eventually(within, what, || {
        let said = Testimony::of(guest.console());
        said.unharmed()?;
        Ok(Some(said).filter(|said| wanted(said)))
    })
    .with_context(why)
}

/// Guests that start in `site` from now on are of the kind with a database.
pub fn furnish(site: &Site) -> Result<()> {
    let made = target_dir()?.join("rig/database-initrd");
    let place = site.host_path(Path::new("/var/lib/libvirt/boot/initrd"))?;
    fs::copy(&made, place).with_context(|| format!("taking {}: run tests/setup.sh", made.display()))?;
    Ok(())
}

/// Defines it with an empty file system on its first disk, which is raw, and starts it.
pub fn start(site: &Site, spec: &GuestSpec) -> Result<Guest> {
    let guest = site.define(spec)?;
    site.run(["mke2fs", "-q", "-F", "-t", "ext4", &spec.disk_path(0)])?;
    guest.start()?;
    Ok(guest)
}

#[cfg(test)]
mod tests {
    use super::Testimony;

    const CHECK: &str = "check=3 boot=a-b integrity=ok rows=7 newest=7 balances=100000 wrong=0 end=3\r\n";

    #[test]
    fn whole_lines_are_read_and_torn_ones_are_not_believed() {
        let said =
            Testimony::parse(&format!("commit=7 boot=a-b end=7\r\n{CHECK}commit=8 boot=a-b end=8\r\n"));
        assert_eq!((said.commits.as_slice(), said.checks.len()), (&[7, 8][..], 1));
        assert!(said.unharmed().is_ok() && said.boots == ["a-b"]);
        for cut in 0..CHECK.len() {
            assert!(Testimony::parse(&CHECK[..cut]).checks.is_empty(), "cut at {cut}");
            let torn = Testimony::parse(&format!("{}commit=12 boot=a-b end=12\r\n", &CHECK[..cut]));
            assert!(torn.checks.is_empty() && torn.commits.len() == usize::from(cut == 0), "cut at {cut}");
        }
    }

    #[test]
    fn harm_of_any_kind_is_told() {
        for (whole, harmed) in [
            ("integrity=ok", "integrity=row_3_missing_from_index_by_source"),
            ("rows=7", "rows=6"),
            ("balances=100000", "balances=99999"),
            ("wrong=0", "wrong=1"),
        ] {
            let said = Testimony::parse(&CHECK.replace(whole, harmed));
            assert!(said.checks.len() == 1 && said.unharmed().is_err(), "{harmed}");
        }
        for words in [
            "Runtime error near line 1: database disk image is malformed (11)\n",
            "EXT4-fs error (device vda): bad block bitmap checksum\n",
            "error=the database ended\n",
            "commit=1 boot=a end=1\ncommit=3 boot=a end=3\n",
        ] {
            assert!(Testimony::parse(words).unharmed().is_err(), "{words}");
        }
    }
}
