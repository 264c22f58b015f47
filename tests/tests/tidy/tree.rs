//! The tree as the checks of `tidy` see it: its files, and what stands in them.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

pub fn nothing(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{} to mend:\n  {}", wrong.len(), wrong.join("\n  "));
}

pub fn root() -> PathBuf {
    // Set by whoever runs tests; a tree that was moved since it was built is looked at where it is now.
    let own = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    own.parent().map_or_else(|| ".".into(), Path::to_path_buf)
}

pub fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Text files of the tree, by their paths from its root.
pub fn files(wanted: impl Fn(&str) -> bool) -> Vec<(String, String)> {
    let (mut found, mut folders) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(folder) = folders.pop() {
        let entries = list(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for (name, kind) in entries {
            let path = folder.join(&name).to_string_lossy().into_owned();
            let ours = [".ci", ".config"].contains(&path.as_str()) || !name.starts_with('.');
            if kind.is_dir() && ours && path != "target" {
                folders.push(path.into());
            } else if kind.is_file() && ours && wanted(&path) {
                // What is no text is nobody's to tidy.
                found.extend(fs::read_to_string(root().join(&path)).ok().map(|text| (path, text)));
            }
        }
    }
    found.sort();
    found
}

fn list(folder: &Path) -> io::Result<Vec<(String, fs::FileType)>> {
    let entries = fs::read_dir(root().join(folder))?;
    entries
        .map(|entry| {
            entry.and_then(|entry| Ok((entry.file_name().to_string_lossy().into_owned(), entry.file_type()?)))
        })
        .collect()
}

pub fn sources() -> Vec<(String, String)> {
    files(|path| path.ends_with(".rs"))
}

pub fn product() -> Vec<(String, String)> {
    let folders = ["src/", "agent/src/", "site-controller/src/"];
    files(|path| path.ends_with(".rs") && folders.iter().any(|folder| path.starts_with(folder)))
}

pub fn is_test(path: &str) -> bool {
    path.contains("/tests/")
        || ["/tests.rs", "/testing.rs", "/contract.rs"].iter().any(|end| path.ends_with(end))
}

pub fn before_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text)
}

/// Without comments.
pub fn code(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.map(|line| line.split(" // ").next().unwrap_or(line)).collect::<Vec<_>>().join("\n")
}

fn in_word(byte: Option<&u8>) -> bool {
    byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_')
}

/// Where `word` stands as a word of its own.
pub fn places(text: &str, word: &str) -> Vec<usize> {
    let bytes = text.as_bytes();
    let apart =
        |at: &usize| !in_word(at.checked_sub(1).map(|at| &bytes[at])) && !in_word(bytes.get(at + word.len()));
    text.match_indices(word).map(|(at, _)| at).filter(apart).collect()
}

pub fn names_crate(code: &str, name: &str) -> bool {
    places(code, name).into_iter().any(|at| {
        let (before, after) = (&code[..at], &code[at + name.len()..]);
        let imported = before.ends_with("use ") || before.ends_with("extern crate ");
        let within_a_path = before.ends_with("::") || before.ends_with('.');
        !within_a_path && (after.starts_with("::") || imported)
    })
}

/// Rooms of the same crate that are named after `crate::`, in groups too.
pub fn used_rooms(code: &str) -> BTreeSet<String> {
    let mut rooms = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        let Some(group) = rest.strip_prefix('{') else {
            rooms.insert(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
            continue;
        };
        let (mut depth, mut word, mut head) = (0, String::new(), true);
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => head = true,
                c if depth == 0 && head && (c.is_alphanumeric() || c == '_') => word.push(c),
                _ if depth == 0 && !word.is_empty() => {
                    head = false;
                }
                _ => {}
            }
            if (!head || c == ',') && !word.is_empty() {
                rooms.insert(std::mem::take(&mut word));
            }
        }
        rooms.insert(word);
    }
    rooms
}

pub fn test_names(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for rest in text.split("#[test]").skip(1).chain(text.split("#[tokio::test").skip(1)) {
        let name = rest
            .split_once("fn ")
            .and_then(|(_, rest)| rest.split_once('('))
            .map(|(name, _)| name.to_owned());
        names.extend(name);
    }
    names
}

pub fn between<'a>(text: &'a str, open: &'a str, close: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(open).skip(1).filter_map(move |rest| rest.split_once(close).map(|(inside, _)| inside))
}

/// Words between single backticks. Blocks are left out: they hold pictures and files.
pub fn inline_code(text: &str) -> impl Iterator<Item = &str> {
    text.split("```").step_by(2).flat_map(|prose| prose.split('`').skip(1).step_by(2))
}

/// The anchor that a heading gets.
pub fn slug(line: &str) -> Option<String> {
    let words = line.strip_prefix('#')?.trim_start_matches('#').trim().to_lowercase();
    let kept = words.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    Some(kept.map(|c| if c == ' ' { '-' } else { c }).collect())
}
