//! `lifeboat apply`: groups as a file says. What the file says is checked as a whole before anything is asked of the site;
//! what stands in each other's way, a VM that goes from one group to another, is done in the order in which it works.

use crate::{
    ask::{Ended, Site, confirm},
    group::path,
};
use anyhow::Context;
use clap::Args;
use lifeboat::local_api::ClientError;
use lifeboat_site_controller::{
    api::types::{GroupRequest, GroupRow},
    console::groups,
    group::{Group as Stored, GroupSpec},
};
use serde::Deserialize;
use similar::{Algorithm, Change, ChangeTag, capture_diff_slices};
use std::{collections::BTreeMap, path::PathBuf};

/// Make groups as a file says; run again, it changes only what differs.
///
/// The file is TOML with one `[[group]]` each: `name`, `vms`, `rpo`, `keep`, `memory`, `consistency`, `runbook`, `drill`.
/// Groups that it does not name are left as they are, unless `--prune` is given.
#[derive(Args)]
pub struct Apply {
    #[arg(short, long)]
    file: PathBuf,
    /// Only show what would be changed.
    #[arg(long)]
    diff: bool,
    /// Delete groups that the file does not name; the points of their VMs stay.
    #[arg(long)]
    prune: bool,
    /// Do not ask before a group is deleted.
    #[arg(long)]
    yes: bool,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    group: Vec<GroupSpec>,
}

/// What was, or would be, done with one group.
#[derive(serde::Serialize)]
struct Applied {
    group: String,
    what: &'static str,
    /// Lines that go (`-`) and come (`+`).
    lines: Vec<String>,
}

impl Apply {
    pub async fn run(self, site: &Site) -> Ended {
        let loaded = lifeboat::config::load::<File>(&self.file).context("reading the groups")?;
        lifeboat::config::refuse(&self.file, &loaded.unknown)?;
        let wanted = loaded.value.group;
        check(&wanted)?;
        let present: Vec<GroupRow> = site.client.get("/v1/groups").await?;
        let is_named = |row: &GroupRow| wanted.iter().any(|spec| spec.name == row.group.spec.name);
        let going: Vec<GroupRow> =
            present.iter().filter(|row| self.prune && !is_named(row)).cloned().collect();
        if !self.diff && !self.yes && !going.is_empty() {
            let preview: String = going.iter().map(groups::delete_preview).collect();
            confirm(&preview, "the name of the first of them", &going[0].group.spec.name)?;
        }
        let before = |spec: &GroupSpec| present.iter().find(|row| row.group.spec.name == spec.name);
        if !self.diff {
            for row in &going {
                let url = format!("{}/delete", path(&row.group.spec.name));
                let _: Stored = site.client.post(&url, &()).await?;
            }
            let changed =
                wanted.iter().filter(|spec| before(spec).is_none_or(|row| row.group.spec != **spec));
            make(site, changed.map(|spec| (spec, before(spec).is_some())).collect()).await?;
        }
        let mut done = Vec::new();
        for spec in &wanted {
            let before = before(spec).map(|row| &row.group.spec);
            let what = match before {
                None => "create",
                Some(before) if before == spec => "keep",
                Some(_) => "change",
            };
            done.push(Applied { group: spec.name.clone(), what, lines: diff(before, Some(spec))? });
        }
        for row in going {
            let spec = row.group.spec;
            let lines = diff(Some(&spec), None)?;
            done.push(Applied { group: spec.name, what: "delete", lines });
        }
        site.print(&done, |done| shown(done))
    }
}

/// All of the file, before any of it is done.
fn check(wanted: &[GroupSpec]) -> anyhow::Result<()> {
    let mut groups = BTreeMap::new();
    let mut members = BTreeMap::new();
    for spec in wanted {
        spec.check()?;
        let name = &spec.name;
        anyhow::ensure!(groups.insert(name, ()).is_none(), "the file has two groups `{name}`");
        for vm in &spec.vms {
            let other = members.insert(vm, name);
            let other = other.map_or("", String::as_str);
            anyhow::ensure!(
                other.is_empty(),
                "{vm} is in group `{other}` and in group `{name}`; a VM can be in one only"
            );
        }
    }
    Ok(())
}

/// Makes and changes them. One that is refused because another still has its VM is tried again once others were changed.
async fn make(site: &Site, mut left: Vec<(&GroupSpec, bool)>) -> anyhow::Result<()> {
    while !left.is_empty() {
        let (count, mut refused) = (left.len(), None);
        let mut stuck = Vec::new();
        for (spec, is_there) in left {
            let url = if is_there { path(&spec.name) } else { "/v1/groups".to_owned() };
            let request = GroupRequest { spec: spec.clone() };
            match site.client.post::<_, GroupRow>(&url, &request).await {
                Ok(_) => {}
                Err(ClientError::Api { status, error }) if error.code == "conflict" => {
                    stuck.push((spec, is_there));
                    refused.get_or_insert((&spec.name, ClientError::Api { status, error }));
                }
                Err(error) => return Err(error).with_context(|| format!("group `{}`", spec.name)),
            }
        }
        if let Some((name, error)) = refused.filter(|_| stuck.len() == count) {
            return Err(error).with_context(|| format!("group `{name}`"));
        }
        left = stuck;
    }
    Ok(())
}

fn diff(before: Option<&GroupSpec>, after: Option<&GroupSpec>) -> anyhow::Result<Vec<String>> {
    let lines = |spec: &GroupSpec| -> anyhow::Result<Vec<String>> {
        Ok(serde_json::to_string_pretty(spec)?.lines().map(str::to_owned).collect())
    };
    Ok(lines_of(&before.map_or(Ok(Vec::new()), lines)?, &after.map_or(Ok(Vec::new()), lines)?))
}

/// What goes and what comes.
fn lines_of(old: &[String], new: &[String]) -> Vec<String> {
    let changes = capture_diff_slices(Algorithm::Lcs, old, new);
    let changes = changes.iter().flat_map(|part| part.iter_changes(old, new));
    let line = |change: Change<String>| match change.tag() {
        ChangeTag::Delete => Some(format!("-{}", change.value())),
        ChangeTag::Insert => Some(format!("+{}", change.value())),
        ChangeTag::Equal => None,
    };
    changes.filter_map(line).collect()
}

fn shown(done: &[Applied]) -> String {
    let one = |applied: &Applied| {
        let lines: String = applied.lines.iter().map(|line| format!("    {line}\n")).collect();
        format!("{} {}\n{lines}", applied.what, applied.group)
    };
    done.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diff_says_what_goes_and_what_comes_also_where_only_the_order_changes() {
        let lines = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let of = |old: &str, new: &str| lines_of(&lines(old), &lines(new)).join(" ");
        assert_eq!(of("a b c", "a b c"), "");
        assert_eq!(of("a b c", "a x c"), "-b +x");
        assert_eq!(of("web db", "db web"), "-web +web");
        assert_eq!((of("", "a b"), of("a b", "")), ("+a +b".to_owned(), "-a -b".to_owned()));
    }

    #[test]
    fn a_file_that_contradicts_itself_is_refused_before_anything_is_done() {
        let group = |name: &str, vms: &[&str]| GroupSpec::new(name, vms);
        check(&[group("shop", &["web"]), group("mail", &["mx"])]).unwrap();
        let twice = check(&[group("shop", &["web"]), group("shop", &["db"])]).unwrap_err();
        assert!(twice.to_string().contains("two groups `shop`"), "{twice}");
        let both = check(&[group("shop", &["web"]), group("mail", &["mx", "web"])]).unwrap_err();
        assert!(both.to_string().contains("`shop` and in group `mail`"), "{both}");
        assert!(check(&[group("shop", &["web"]), group("a/b", &["mx"])]).is_err());
    }
}
