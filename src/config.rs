//! Configuration files: TOML text to what the operator wrote, typed. What it means is checked by each daemon.
//! Promises: an error names the file, the place and the key; a key that nobody knows is reported, never ignored in silence.
//! Called by both daemons at start and by `--check-config`. The one home of toml.

use serde::de::DeserializeOwned;
use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// A file that was read, with what nobody asked for. A daemon warns of unknown keys; `--check-config` fails on them.
#[derive(Debug)]
pub struct Loaded<T> {
    pub value: T,
    pub unknown: Vec<UnknownKey>,
}

/// A key in a file that means nothing to this release: a typing error, or meant for a newer one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownKey {
    pub file: PathBuf,
    /// With the names of the tables around it: `replication.interval`.
    pub key: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{file}: can't be read", file = file.display())]
    Read {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file is no TOML, or a key has a value that it can't have.
    #[error("{file}:{line}: {key_and_colon}{why}", file = file.display(), key_and_colon = colon(key))]
    Value { file: PathBuf, line: usize, key: String, why: String },
    /// A value can be read but does not make sense; raised by the daemons' own checks, through [`invalid`].
    #[error("{file}: {key} = {given}: {why}", file = file.display())]
    Invalid { file: PathBuf, key: String, given: String, why: String },
    #[error("{file}: this release knows no key {keys}; is it misspelt?", file = file.display())]
    Unknown { file: PathBuf, keys: String },
}

/// Reads a file that may be missing if it is the default one: every key has a default.
pub fn load_or_default<T: DeserializeOwned>(file: &Path, default: &str) -> Result<Loaded<T>, ConfigError> {
    if file.as_os_str() == default && !file.exists() { parse(file, "") } else { load(file) }
}

/// For a daemon: says which keys mean nothing, and goes on.
pub fn warn_of(unknown: &[UnknownKey]) {
    for key in unknown {
        tracing::warn!(file = %key.file.display(), key = %key.key, "unknown key in the configuration");
    }
}

/// For `check-config`: a key that means nothing is an error.
pub fn refuse(file: &Path, unknown: &[UnknownKey]) -> Result<(), ConfigError> {
    if unknown.is_empty() {
        return Ok(());
    }
    let keys: Vec<String> = unknown.iter().map(|key| format!("`{}`", key.key)).collect();
    Err(ConfigError::Unknown { file: file.to_owned(), keys: keys.join(", ") })
}

/// Reads a file of at most 1 MiB.
pub fn load<T: DeserializeOwned>(file: &Path) -> Result<Loaded<T>, ConfigError> {
    let read_error = |source| ConfigError::Read { file: file.to_owned(), source };
    let mut text = String::new();
    File::open(file).and_then(|open| open.take(FILE_MAX).read_to_string(&mut text)).map_err(read_error)?;
    if text.len() as u64 == FILE_MAX {
        return Err(read_error(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB")));
    }
    parse(file, &text)
}

/// The same from text; `file` is only named in errors.
pub fn parse<T: DeserializeOwned>(file: &Path, text: &str) -> Result<Loaded<T>, ConfigError> {
    let refuse = |error: toml::de::Error| {
        let at = error.span().map_or(0, |span| span.start);
        let (line, key) = locate(text, at);
        ConfigError::Value { file: file.to_owned(), line, key, why: error.message().trim().to_owned() }
    };
    let document = toml::Deserializer::parse(text).map_err(refuse)?;
    let mut unknown = Vec::new();
    let value = serde_ignored::deserialize(document, |path| {
        unknown.push(UnknownKey { file: file.to_owned(), key: path.to_string() });
    })
    .map_err(refuse)?;
    Ok(Loaded { value, unknown })
}

/// For the daemons' checks: `key` was given a value that can't be used; `why` says which would do.
pub fn invalid(file: &Path, key: &str, given: impl ToString, why: impl ToString) -> ConfigError {
    ConfigError::Invalid {
        file: file.to_owned(),
        key: key.to_owned(),
        given: given.to_string(),
        why: why.to_string(),
    }
}

impl std::fmt::Display for UnknownKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: unknown key `{}` (a typing error?)", self.file.display(), self.key)
    }
}

/// The line that byte `at` stands in, counted from 1, and the key that this line sets, with its table.
fn locate(text: &str, at: usize) -> (usize, String) {
    let before = text.get(..at).unwrap_or(text);
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let this = text.get(start..).and_then(|rest| rest.lines().next()).unwrap_or_default();
    let Some((key, _)) = this.split_once('=') else {
        return (before.matches('\n').count() + 1, String::new());
    };
    let table = before[..start].lines().rev().find_map(|line| {
        let line = line.split('#').next()?.trim();
        line.strip_prefix('[').map(|rest| rest.trim_start_matches('[').trim_end_matches(']').trim())
    });
    let key = key.trim();
    let key = table.map_or_else(|| key.to_owned(), |table| format!("{table}.{key}"));
    (before.matches('\n').count() + 1, key)
}

fn colon(key: &str) -> String {
    if key.is_empty() { String::new() } else { format!("{key}: ") }
}

const FILE_MAX: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Span;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    struct Raw {
        site: String,
        #[serde(default)]
        replication: Replication,
        #[serde(default)]
        vm: Vec<Vm>,
    }
    #[derive(Debug, Default, Deserialize)]
    struct Replication {
        interval: Option<Span>,
    }
    #[derive(Debug, Deserialize)]
    struct Vm {
        name: String,
    }

    fn read(text: &str) -> Result<Loaded<Raw>, ConfigError> {
        parse(Path::new("agent.toml"), text)
    }

    #[test]
    fn what_the_operator_wrote_is_read_and_unknown_keys_are_listed() {
        let text = "site = \"dr:4800\"\nsiet = 1\n[replication]\ninterval = \"5s\"\nintervall = \"6s\"\n[[vm]]\nname = \"a\"\nnmae = 3\n";
        let loaded = read(text).unwrap();
        assert_eq!((loaded.value.site.as_str(), loaded.value.vm[0].name.as_str()), ("dr:4800", "a"));
        assert_eq!(loaded.value.replication.interval.unwrap().0.as_secs(), 5);
        let keys: Vec<_> = loaded.unknown.iter().map(|unknown| unknown.key.as_str()).collect();
        assert_eq!(keys, ["replication.intervall", "siet", "vm.0.nmae"]);
        assert!(loaded.unknown[1].to_string().starts_with("agent.toml: unknown key `siet`"));
    }

    #[test]
    fn an_error_names_the_file_the_line_the_key_and_what_would_do() {
        let error =
            read("site = \"x\"\n\n[replication] # how often\ninterval = \"5 parsecs\"\n").unwrap_err();
        let said = error.to_string();
        assert!(said.starts_with("agent.toml:4: replication.interval: "), "{said}");
        assert!(said.contains("5 parsecs") && said.contains("`5s`"), "{said}");
        let said = read("site = 7\n").unwrap_err().to_string();
        assert!(said.starts_with("agent.toml:1: site: "), "{said}");
        let said = read("site = \"a\"\nwhat is this\n").unwrap_err().to_string();
        assert!(said.starts_with("agent.toml:2: "), "{said}");
        let said = read("").unwrap_err().to_string();
        assert!(said.contains("site"), "{said}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = load::<Raw>(Path::new("/nonexistent/agent.toml")).unwrap_err();
        assert!(matches!(&error, ConfigError::Read { .. }));
        assert!(error.to_string().contains("/nonexistent/agent.toml"));
    }
}
