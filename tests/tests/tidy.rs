//! The shape of the tree, enforced: sizes, headers, which room may use what, and that the documents tell the truth.
//! Reads files only; needs no rig. A check that fails lists every place, so that one run shows all there is to mend.

#[path = "tidy/imports.rs"]
mod imports;
#[path = "tidy/tree.rs"]
mod tree;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};
use tree::*;

const LINES_MAX: usize = 500;

/// A foreign crate and the only places (beginnings of paths) that may name it. The bench may use what it likes.
const ROOMS: &[(&str, &[&str])] = &[
    ("virt", &["src/hypervisor/libvirt"]),
    ("quinn_proto", &["src/transport"]),
    ("quinn", &["src/transport"]),
    ("rustls", &["src/transport"]),
    ("tokio_rustls", &["src/transport/https.rs"]),
    ("rcgen", &["src/transport"]),
    ("x509_parser", &["src/transport"]),
    ("pem", &["src/transport"]),
    ("aws_lc_rs", &["src/transport"]),
    ("sled", &["site-controller/src/catalog"]),
    ("zstd", &["src/chunk/codec.rs"]),
    ("base64", &["src/witness/etcd.rs"]),
    ("blake3", &["src/chunk/digest.rs"]),
    ("object_store", &["site-controller/src/store/local.rs"]),
    ("indicatif", &["site-controller/src/console"]),
    ("similar", &["site-controller/src/bin/lifeboat/apply.rs"]),
    ("axum", &["src/local_api", "agent/src/admin.rs", "site-controller/src/api"]),
    ("hyper", &["src/local_api"]),
    ("hyper_util", &["src/local_api"]),
    ("http_body_util", &["src/local_api"]),
    ("toml", &["src/config.rs"]),
    ("serde_ignored", &["src/config.rs"]),
    ("tracing_subscriber", &["src/telemetry.rs"]),
    ("jiff", &["src/units.rs", "src/calendar.rs", "site-controller/src/catalog"]),
    ("xxhash_rust", &["agent/src/capture", "src/chunk/digest.rs"]),
    ("quick_cache", &["agent/src/ship/base_cache.rs"]),
    (
        "xmltree",
        &[
            "src/hypervisor/domain_xml",
            "site-controller/src/failover/replica_xml",
            "site-controller/src/failover/huge_pages.rs",
        ],
    ),
    (
        "postcard",
        &[
            "src/format",
            "src/wire",
            "src/transport",
            "site-controller/src/store",
            "site-controller/src/catalog",
        ],
    ),
    ("sd_notify", &["agent/src/daemon.rs", "site-controller/src/daemon.rs"]),
    (
        "anyhow",
        &[
            "agent/src/main.rs",
            "agent/src/fencing.rs",
            "agent/src/daemon.rs",
            "agent/src/daemon/",
            "site-controller/src/main.rs",
            "site-controller/src/daemon.rs",
            "site-controller/src/setup.rs",
            "site-controller/src/bin/",
        ],
    ),
];

/// Programs of others that documents tell to type.
const OTHER_PROGRAMS: &[&str] = &["apt", "apt-get", "cargo", "curl", "make", "sudo", "systemctl", "virsh"];

/// Rooms of the daemons: each may use those of its own line and of the lines above.
const AGENT: &[&[&str]] = &[
    &["watchdog"],
    &["capture"],
    &["config"],
    &["protect", "ship"],
    &["witness"],
    &["fence"],
    &["admin"],
    &["daemon"],
];
const SITE: &[&[&str]] = &[
    &["config", "store"],
    &["catalog", "restore", "verify", "setup"],
    &["intake"],
    &["group"],
    &["failover"],
    &["retention", "seed", "readiness", "drill"],
    &["automatic"],
    &["handover", "report"],
    &["api"],
    &["console"],
    &["daemon"],
];

/// Rooms that are two halves of one: the actor, and the link that it is given.
const MUTUAL: &[&str] = &["protect", "ship"];

#[test]
fn every_source_file_is_short_and_starts_with_its_header() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let lines = text.lines().count();
        if lines > LINES_MAX {
            wrong.push(format!("{path}: {lines} lines, at most {LINES_MAX}"));
        }
        if !text.starts_with("//!") && !path.ends_with("/tests.rs") {
            wrong.push(format!("{path}: does not start with a `//!` header"));
        }
    }
    nothing(wrong);
}

#[test]
fn nothing_is_left_unfinished() {
    // Put together here, so that this file does not find itself.
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    let macros = [concat!("to", "do!"), concat!("unimple", "mented!")];
    let mut wrong = Vec::new();
    for (path, text) in files(|path| !path.ends_with(".lock")) {
        let rust = path.ends_with(".rs");
        for (line, said) in text.lines().enumerate().map(|(at, said)| (at + 1, said)) {
            let has = |word: &&str| !places(said, word).is_empty();
            if words.iter().any(has) || (rust && macros.iter().any(|call| said.contains(call))) {
                wrong.push(format!("{path}:{line}: {}", said.trim()));
            }
            if ["<<<<<<< ", ">>>>>>> "].iter().any(|mark| said.starts_with(mark)) {
                wrong.push(format!("{path}:{line}: a conflict that was not resolved"));
            }
        }
    }
    nothing(wrong);
}

#[test]
fn foreign_crates_stay_in_their_rooms() {
    let mut wrong = Vec::new();
    for (path, text) in product() {
        let code = code(&text);
        for (name, rooms) in ROOMS {
            let at_home = rooms.iter().any(|room| path.starts_with(room));
            if !at_home && names_crate(&code, name) {
                wrong.push(format!("{path}: names `{name}`, which belongs to {}", rooms.join(", ")));
            }
        }
    }
    nothing(wrong);
}

#[test]
fn the_daemons_meet_only_on_the_wire() {
    let apart = [
        ("src/", ["lifeboat_agent", "lifeboat_site_controller"].as_slice()),
        ("agent/src/", &["lifeboat_site_controller"]),
        ("site-controller/src/", &["lifeboat_agent"]),
    ];
    let mut wrong = Vec::new();
    for (path, text) in product() {
        let code = code(&text);
        for (folder, strangers) in apart.iter().filter(|(folder, _)| path.starts_with(folder)) {
            let met = strangers.iter().filter(|stranger| !places(&code, stranger).is_empty());
            wrong.extend(met.map(|stranger| format!("{path}: {folder} must not know {stranger}")));
        }
    }
    for (manifest, stranger) in
        [("agent/Cargo.toml", "lifeboat-site-controller"), ("site-controller/Cargo.toml", "lifeboat-agent")]
    {
        let depends = |line: &str| {
            line.starts_with(&format!("{stranger}.")) || line.starts_with(&format!("{stranger} "))
        };
        if read(manifest).lines().any(depends) {
            wrong.push(format!("{manifest}: depends on {stranger}"));
        }
    }
    nothing(wrong);
}

/// Method: the layers of the shared library are those that `src/lib.rs` tells to read in order. Within a layer a room may
/// use another, but no two each other.
#[test]
fn imports_point_only_towards_the_vocabulary() {
    let lib = read("src/lib.rs");
    let header: String = lib.lines().take_while(|line| line.starts_with("//!")).collect();
    let layer = |no: u32| {
        let rest = header.split_once(&format!("//! {no}. "))?.1;
        Some(between(rest.split(&format!("//! {}. ", no + 1)).next()?, "[`", "`]").collect())
    };
    let layers: Vec<Vec<&str>> = (1..).map_while(layer).collect();
    let layers: Vec<&[&str]> = layers.iter().map(Vec::as_slice).collect();
    let mut wrong = Vec::new();
    for (folder, order) in
        [("src/", layers.as_slice()), ("agent/src/", AGENT), ("site-controller/src/", SITE)]
    {
        let rank = |room: &str| order.iter().position(|layer| layer.contains(&room));
        for declared in
            read(&format!("{folder}lib.rs")).lines().filter_map(|line| line.strip_prefix("pub mod "))
        {
            let room = declared.trim_end_matches(';');
            if rank(room).is_none() {
                wrong.push(format!("{folder}lib.rs: `{room}` has no place in the order of rooms"));
            }
        }
        let mut uses = BTreeSet::new();
        for (path, text) in
            product().into_iter().filter(|(path, _)| path.starts_with(folder) && !is_test(path))
        {
            let room = path[folder.len()..].split(['/', '.']).next().unwrap_or_default().to_owned();
            let Some(own) = rank(&room) else { continue };
            for used in used_rooms(&code(before_tests(&text))) {
                if rank(&used).is_some_and(|used| used > own) {
                    wrong.push(format!("{path}: `{room}` must not use `{used}`"));
                }
                if used != room
                    && uses.contains(&(used.clone(), room.clone()))
                    && !MUTUAL.contains(&room.as_str())
                {
                    wrong.push(format!("{path}: `{room}` and `{used}` use each other"));
                }
                uses.insert((room.clone(), used));
            }
        }
    }
    nothing(wrong);
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let mut wrong = Vec::new();
    for folder in ["src/", "agent/src/", "site-controller/src/"] {
        let files = product().into_iter().filter(|(path, _)| !is_test(path));
        let of_crate = files.filter_map(|(path, text)| Some((path.strip_prefix(folder)?.to_owned(), text)));
        let files: Vec<_> = of_crate.filter(|(path, _)| !path.starts_with("bin/")).collect();
        let circles = imports::circles(&files).into_iter();
        wrong.extend(circles.map(|circle| format!("{folder}: {}", circle.join(", "))));
    }
    nothing(wrong);
}

#[test]
fn every_file_that_a_document_names_exists() {
    let tops = ["src/", "agent/", "site-controller/", "tests/", "docs/", "packaging/", ".ci/"];
    let mut wrong = Vec::new();
    for (path, text) in files(|path| path.ends_with(".md")) {
        let folder = Path::new(&path).parent().unwrap_or(Path::new("")).to_owned();
        for target in between(&text, "](", ")").filter(|target| !target.contains("://")) {
            let (file, anchor) = target.split_once('#').map_or((target, None), |(file, at)| (file, Some(at)));
            let meant = if file.is_empty() { PathBuf::from(&path) } else { folder.join(file) };
            if !root().join(&meant).exists() {
                wrong.push(format!("{path}: links to {target}, which is not there"));
            } else if let Some(anchor) = anchor
                && !read(&meant.to_string_lossy()).lines().any(|line| slug(line).as_deref() == Some(anchor))
            {
                wrong.push(format!("{path}: links to {target}, which has no such heading"));
            }
        }
        for word in inline_code(&text).filter(|word| tops.iter().any(|top| word.starts_with(top))) {
            if !word.contains(['*', ' ', '<', '{', '…']) && !root().join(word).exists() {
                wrong.push(format!("{path}: names {word}, which is not there"));
            }
        }
    }
    for (path, text) in sources() {
        for rest in text.split("docs/").skip(1) {
            let name: String =
                rest.chars().take_while(|c| c.is_ascii_alphanumeric() || "-_/.".contains(*c)).collect();
            let Some((stem, _)) = name.split_once(".md") else { continue };
            if !stem.is_empty() && !root().join(format!("docs/{stem}.md")).exists() {
                wrong.push(format!("{path}: names docs/{stem}.md, which is not there"));
            }
        }
    }
    nothing(wrong);
}

/// Goal: nobody is told to type what a program refuses. Method: flags in documents against the fields clap reads.
#[test]
fn every_flag_that_a_document_tells_to_type_exists() {
    let folder = |of: &str| {
        let within = files(|path| path.starts_with(of));
        within.into_iter().map(|(_, text)| text).collect::<String>()
    };
    let programs: BTreeMap<&str, String> = [
        ("lifeboat-agent", ["agent/src/main.rs", "agent/src/watchdog.rs"].map(read).concat()),
        ("lifeboat-site-controller", read("site-controller/src/main.rs")),
        ("lifeboat", folder("site-controller/src/bin/lifeboat/")),
    ]
    .into();
    let makefile = read("Makefile");
    let mut wrong = Vec::new();
    let told =
        |path: &str| path.ends_with(".md") || (path.starts_with("packaging/") && path.ends_with(".toml"));
    for (path, text) in files(told) {
        for (at, line) in text.lines().enumerate() {
            // A word after a program's name belongs to it, until another program is named, ours or not.
            let mut reader = None;
            for word in line.split(|c: char| c.is_whitespace() || "`()[],;'\"|".contains(c)) {
                reader = programs.get(word).or(reader.filter(|_| !OTHER_PROGRAMS.contains(&word)));
                let flag = word.strip_prefix("--").map(|flag| flag.split('=').next().unwrap_or(flag));
                let (Some(flag), Some(reader)) = (flag.filter(|flag| !flag.is_empty()), reader) else {
                    continue;
                };
                let field = format!("{}:", flag.replace('-', "_"));
                let known = reader.contains(&field) || reader.contains(&format!("long = \"{flag}\""));
                if !known && !["help", "version"].contains(&flag) {
                    wrong.push(format!("{path}:{}: no program takes --{flag}: {}", at + 1, line.trim()));
                }
            }
        }
        for target in inline_code(&text).filter_map(|word| word.strip_prefix("make ")) {
            let target = target.split_whitespace().next().unwrap_or_default();
            if !makefile.lines().any(|line| line.starts_with(&format!("{target}:"))) {
                wrong.push(format!("{path}: `make {target}` is no target of the Makefile"));
            }
        }
    }
    nothing(wrong);
}

/// Goal: an invariant names what shows it, or says that nothing does. Method: words of docs/safety.md that look like
/// a test's name against the tests there are.
#[test]
fn every_invariant_names_tests_that_exist() {
    let tests: BTreeSet<String> = sources().iter().flat_map(|(_, text)| test_names(text)).collect();
    let safety = read("docs/safety.md");
    let looks_like_one = |word: &&str| {
        word.matches('_').count() >= 2
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    let mut wrong: Vec<String> = inline_code(&safety)
        .filter(looks_like_one)
        .filter(|word| !tests.contains(*word))
        .map(|word| format!("docs/safety.md: there is no test `{word}`"))
        .collect();
    let mut known = BTreeSet::new();
    for section in safety.split("\n## ").skip(1) {
        let Some(number) = section.strip_prefix("I-").and_then(|rest| rest.split_whitespace().next()) else {
            continue;
        };
        known.insert(format!("I-{}", number.trim_end_matches('.')));
        let named = inline_code(section).any(|word| tests.contains(word));
        if !named && !section.contains("No test") && !section.contains("Not implemented") {
            wrong.push(format!(
                "docs/safety.md: I-{number} names no test and does not say that there is none"
            ));
        }
    }
    for (path, text) in sources().iter().filter(|(path, _)| !path.ends_with("tidy.rs")) {
        for at in places(text, "I") {
            let digits: String = text[at + 1..]
                .strip_prefix('-')
                .unwrap_or("")
                .chars()
                .take_while(char::is_ascii_digit)
                .collect();
            let name = format!("I-{digits}");
            if !digits.is_empty() && !known.contains(&name) {
                wrong.push(format!("{path}: speaks of {name}, which docs/safety.md does not have"));
            }
        }
    }
    nothing(wrong);
}

#[test]
fn every_decision_is_in_the_index_and_ci_runs_what_people_run() {
    let index = read("docs/decisions/README.md");
    let mut wrong = Vec::new();
    for (path, _) in files(|path| path.starts_with("docs/decisions/") && !path.ends_with("README.md")) {
        let name = path.trim_start_matches("docs/decisions/");
        if !index.contains(&format!("({name})")) {
            wrong.push(format!("docs/decisions/README.md: does not list {name}"));
        }
    }
    if !read(".ci/run").lines().any(|line| line.trim_start_matches("exec ").trim() == "make test") {
        wrong.push(".ci/run: does not call `make test`".into());
    }
    nothing(wrong);
}
