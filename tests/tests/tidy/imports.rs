//! Which file of a crate imports which, as its `use` lines tell: names that a module hands on (`pub use`) are followed
//! to where they come from. A module and what lies below it are one room: its parts may use what it owns, and it its
//! parts. Names that the code spells out in full are not seen.

use super::tree::{before_tests, code};
use std::collections::{BTreeMap, BTreeSet};

/// The path of a module below its crate.
type Module = Vec<String>;

/// One name that a file imports.
struct Import {
    path: Vec<String>,
    /// What it is called here.
    name: String,
    handed_on: bool,
}

/// Of the files of one crate, by their paths from its root, those that import each other: each circle sorted.
pub fn circles(files: &[(String, String)]) -> BTreeSet<Vec<String>> {
    let modules: BTreeMap<Module, (&str, Vec<Import>)> = files
        .iter()
        .map(|(path, text)| (module_of(path), (path.as_str(), imports(&code(before_tests(text))))))
        .collect();
    let mut arrows = BTreeMap::<&str, BTreeSet<&str>>::new();
    for (module, (path, imports)) in &modules {
        for import in imports {
            let to = target(&modules, module, &import.path, 8).filter(|to| !module.starts_with(to));
            let to = to.and_then(|to| Some(modules.get(&to)?.0));
            arrows.entry(path).or_default().extend(to);
        }
    }
    let reached: BTreeMap<&str, BTreeSet<&str>> =
        arrows.keys().map(|from| (*from, reach(&arrows, from))).collect();
    let both = |a: &str, b: &str| reached.get(a).is_some_and(|reached| reached.contains(b));
    let circle = |from: &&str| -> Vec<String> {
        reached[*from].iter().filter(|to| both(to, from)).map(|to| (*to).to_owned()).collect()
    };
    reached.keys().map(circle).filter(|circle| !circle.is_empty()).collect()
}

fn reach<'a>(arrows: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &'a str) -> BTreeSet<&'a str> {
    let (mut reached, mut ahead) = (BTreeSet::new(), vec![from]);
    while let Some(at) = ahead.pop() {
        ahead.extend(arrows.get(at).into_iter().flatten().filter(|to| reached.insert(**to)));
    }
    reached
}

/// The module that `path`, as `module` writes it, comes from; none if that is another crate.
fn target(
    modules: &BTreeMap<Module, (&str, Vec<Import>)>,
    module: &Module,
    path: &[String],
    most: usize,
) -> Option<Module> {
    let (first, mut rest) = path.split_first()?;
    let mut at = match first.as_str() {
        "crate" => Module::new(),
        "self" => module.clone(),
        "super" => module.split_last()?.1.to_vec(),
        child => {
            let child = [module.as_slice(), &[child.to_owned()]].concat();
            modules.contains_key(&child).then_some(child)?
        }
    };
    while let Some((next, after)) = rest.split_first() {
        let below = [at.as_slice(), std::slice::from_ref(next)].concat();
        at = match next.as_str() {
            "super" => at.split_last()?.1.to_vec(),
            _ if modules.contains_key(&below) => below,
            name => {
                let handed_on = |import: &&Import| import.handed_on && import.name == name;
                let from = modules.get(&at).and_then(|(_, imports)| imports.iter().find(handed_on));
                let from =
                    from.filter(|_| most > 0).map(|import| target(modules, &at, &import.path, most - 1));
                return from.unwrap_or(Some(at));
            }
        };
        rest = after;
    }
    Some(at)
}

/// `store/mod.rs` is `store`, `store/pin.rs` is `store::pin`, `lib.rs` is the crate.
fn module_of(path: &str) -> Module {
    let path = path.trim_end_matches(".rs");
    let path = path.strip_suffix("/mod").unwrap_or(if path == "lib" { "" } else { path });
    path.split('/').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn imports(code: &str) -> Vec<Import> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let before = code[..at].rsplit('\n').next().unwrap_or_default();
        let handed_on = before.starts_with("pub");
        if before.is_empty() || (handed_on && before.ends_with(' ') && !before.contains("fn ")) {
            let tree = code[at + 4..].split(';').next().unwrap_or_default();
            expand(tree, &[], handed_on, &mut found);
        }
    }
    found
}

fn expand(tree: &str, before: &[String], handed_on: bool, found: &mut Vec<Import>) {
    let (head, group) = tree.split_once('{').map_or((tree, None), |(head, group)| (head, Some(group)));
    let (head, alias) = head.split_once(" as ").map_or((head, None), |(head, alias)| (head, Some(alias)));
    let names =
        head.split("::").map(str::trim).filter(|name| !name.is_empty() && !["self", "*"].contains(name));
    // `self` alone begins a path; in a group it is the group's own module.
    let begins = (before.is_empty() && head.trim_start().starts_with("self::")).then(|| "self".to_owned());
    let path: Vec<String> = before.iter().cloned().chain(begins).chain(names.map(str::to_owned)).collect();
    let Some(group) = group else {
        let name = alias.map(|alias| alias.trim().to_owned()).or_else(|| path.last().cloned());
        found.extend(name.map(|name| Import { path, name, handed_on }));
        return;
    };
    let (mut depth, mut item) = (0, String::new());
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => expand(&std::mem::take(&mut item), &path, handed_on, found),
            c => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                item.push(c);
            }
        }
    }
    if !item.trim().is_empty() {
        expand(&item, &path, handed_on, found);
    }
}

#[test]
fn circles_are_found_through_groups_and_names_that_are_handed_on() {
    let of = |files: &[(&str, &str)]| {
        let files: Vec<_> =
            files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
        circles(&files).into_iter().map(|circle| circle.join(" ")).collect::<Vec<_>>()
    };
    let face = ("room/mod.rs", "mod a;\nmod b;\npub use b::{B, C};\n");
    let to_b = ("room/a.rs", "use crate::{\n    lib,\n    room::{self, C as D},\n};\npub struct A;\n");
    let back = ("room/b.rs", "use super::a::{self, A};\npub struct B;\n");
    assert_eq!(of(&[face, to_b, back]), ["room/a.rs room/b.rs"]);
    let elsewhere =
        ("room/b.rs", "// use super::a;\nuse std::a::A;\n#[cfg(test)]\nmod tests {\nuse super::a;\n}\n");
    assert!(of(&[face, to_b, elsewhere]).is_empty());
    let owner = ("room/mod.rs", "mod b;\nuse b::B;\npub struct Room(B);\n");
    assert!(of(&[owner, ("room/b.rs", "use super::Room;\npub struct B;\n")]).is_empty());
    let stranger = ("other.rs", "use crate::room::Room;\n");
    assert_eq!(
        of(&[owner, stranger, ("room/b.rs", "use crate::other;\n")]),
        ["other.rs room/b.rs room/mod.rs"]
    );
}
