//! Group points: for each cut that became whole, the point of every member. One small file each, created and synced once
//! all of these points are durable. Promises: what is listed is whole: every member's point of that instant is there; a
//! file that can't be read offers nothing. Called by `coordinator`, `failover` and `api`.

use super::book::Group;
use crate::{
    catalog::Selector,
    store::{Ask, PointState, Store, StoreError},
};
use lifeboat::{
    durable,
    format::manifest::Consistency,
    id::{CutId, GroupId, PointId, VmId},
    units::{Seq, UnixMs},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

/// One instant of a whole group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GroupPoint {
    pub version: u32,
    pub cut: CutId,
    /// Its place in the group's history.
    pub no: u64,
    /// By this site's clock; the members' points bear the same.
    pub cut_at: UnixMs,
    /// Between the first and the last word that a member stands, as heard here: its guests stood together after that.
    pub skew_us: u64,
    pub members: Vec<PointOf>,
}

/// A member's part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PointOf {
    pub vm: VmId,
    pub name: String,
    pub point: PointId,
    pub seq: Seq,
    pub pause_us: u64,
    /// What it is; unknown of points of a release before this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
}

impl GroupPoint {
    /// What it is at the least: as its weakest member. Unknown where that of one is.
    pub fn consistency(&self) -> Option<Consistency> {
        let rank = |consistency: &Consistency| match consistency {
            Consistency::Crash => 0,
            Consistency::App => 1,
            Consistency::Memory => 2,
        };
        let all = self.members.iter().map(|member| member.consistency).collect::<Option<Vec<_>>>()?;
        all.into_iter().min_by_key(rank)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum GroupPointError {
    #[error("{}: {source}", path.display())]
    Disk { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the ids of {count} points of the group begin with `{given}`; write more of it")]
    Several { given: String, count: usize },
}

/// Those of all groups of a site.
#[derive(Debug)]
pub struct GroupPoints {
    dir: PathBuf,
    store: Store,
    groups: Mutex<BTreeMap<GroupId, BTreeMap<u64, GroupPoint>>>,
    /// One is written at a time, so that no number is given twice.
    writing: Mutex<()>,
}

impl GroupPoint {
    pub const VERSION: u32 = 1;
}

impl GroupPoints {
    /// Reads what there is below `dir`: a folder for each group.
    pub fn open(dir: PathBuf, store: Store) -> Result<Self, GroupPointError> {
        let failed = |path: &PathBuf, source| GroupPointError::Disk { path: path.clone(), source };
        fs::create_dir_all(&dir).map_err(|source| failed(&dir, source))?;
        let mut groups = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(|source| failed(&dir, source))? {
            let folder = entry.map_err(|source| failed(&dir, source))?.path();
            let id = folder.file_name().and_then(|name| name.to_str()?.parse::<GroupId>().ok());
            let Some(id) = id.filter(|_| folder.is_dir()) else { continue };
            let mut points = BTreeMap::new();
            for entry in fs::read_dir(&folder).map_err(|source| failed(&folder, source))?.flatten() {
                let text = fs::read(entry.path());
                let point = text.ok().and_then(|text| serde_json::from_slice::<GroupPoint>(&text).ok());
                match point.filter(|point| point.version == GroupPoint::VERSION) {
                    Some(point) => drop(points.insert(point.no, point)),
                    None => tracing::warn!(path = %entry.path().display(), "this group point can't be read"),
                }
            }
            groups.insert(id, points);
        }
        Ok(Self { dir, store, groups: Mutex::new(groups), writing: Mutex::new(()) })
    }

    /// The next number of a group's history.
    fn next_no(&self, group: GroupId) -> u64 {
        let groups = self.groups();
        groups.get(&group).and_then(|points| points.keys().next_back()).map_or(1, |no| no + 1)
    }

    /// All its members' points are durable: so is it, once this returns. Blocks.
    pub fn record(&self, group: GroupId, point: GroupPoint) -> Result<GroupPoint, GroupPointError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let point = GroupPoint { no: self.next_no(group), ..point };
        let folder = self.dir.join(group.to_string());
        let path = folder.join(format!("{:016}.json", point.no));
        let written = fs::create_dir_all(&folder)
            .and_then(|()| fs::File::open(&self.dir)?.sync_all())
            .and_then(|()| Ok(serde_json::to_vec(&point)?))
            .and_then(|bytes| durable::replace(&path, &bytes, 0o600));
        written.map_err(|source| GroupPointError::Disk { path, source })?;
        self.groups().entry(group).or_default().insert(point.no, point.clone());
        Ok(point)
    }

    /// The points of a group whose members' points are all there and whole, oldest first. Of VMs that have left the group
    /// nothing is asked, and nothing is told.
    pub async fn list(&self, group: &Group) -> Result<Vec<GroupPoint>, GroupPointError> {
        let mut all = self.recorded(group);
        let (whole, _) = self.there(&all).await?;
        all.retain(|point| is_there(point, &whole));
        // Of two that became durable at once the numbers may stand the wrong way round.
        all.sort_by_key(|point| (point.cut_at, point.no));
        Ok(all)
    }

    /// The places of a VM's points in its history.
    pub async fn points_of(&self, vm: VmId) -> Result<BTreeMap<PointId, Seq>, GroupPointError> {
        Ok(self.store.points(Some(vm)).await?.into_iter().map(|point| (point.point, point.seq)).collect())
    }

    /// Those of them that hold all that are members now: what a failover of the group may take.
    pub async fn offered(&self, group: &Group) -> Result<Vec<GroupPoint>, GroupPointError> {
        let mut points = self.list(group).await?;
        points.retain(|point| holds_all(point, group));
        Ok(points)
    }

    /// The newest of those, and how many are recorded; without a look at all of them.
    pub async fn newest(&self, group: &Group) -> Result<(Option<GroupPoint>, u64), GroupPointError> {
        let mut recorded = self.recorded(group);
        recorded.retain(|point| holds_all(point, group));
        recorded.sort_by_key(|point| (point.cut_at, point.no));
        let count = recorded.len() as u64;
        while let Some(point) = recorded.pop() {
            if self.is_whole(&point).await? {
                return Ok((Some(point), count));
            }
        }
        Ok((None, count))
    }

    /// What a member's point is.
    pub async fn consistency_of(&self, of: &PointOf) -> Result<Option<Consistency>, GroupPointError> {
        let found = self.store.find(of.vm, Ask::WholeBefore(Seq(of.seq.0.saturating_add(1)))).await?;
        Ok(found.filter(|found| found.point == of.point).map(|found| found.consistency))
    }

    async fn is_whole(&self, point: &GroupPoint) -> Result<bool, GroupPointError> {
        for of in &point.members {
            let found = self.store.find(of.vm, Ask::WholeBefore(Seq(of.seq.0.saturating_add(1)))).await?;
            if found.is_none_or(|found| found.point != of.point) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The one of them that is meant.
    pub async fn select(
        &self,
        group: &Group,
        selector: &Selector,
    ) -> Result<Option<GroupPoint>, GroupPointError> {
        let points = self.offered(group).await?;
        let found = match selector {
            Selector::Latest => points.last(),
            Selector::AtOrBefore(at) => points.iter().rev().find(|point| point.cut_at <= *at),
            Selector::Id(given) => {
                let mut meant =
                    points.iter().filter(|point| point.cut.to_string().starts_with(given.as_str()));
                let (found, more) = (meant.next(), meant.count());
                if more > 0 {
                    return Err(GroupPointError::Several { given: given.clone(), count: more + 1 });
                }
                found
            }
        };
        Ok(found.cloned())
    }

    /// Forgets those of which a member's point was pruned.
    pub async fn tidy(&self, group: &Group) -> Result<usize, GroupPointError> {
        let (id, all) = (group.id, self.all(group.id));
        let (_, there) = self.there(&all).await?;
        let newest = all.last().map(|point| point.no);
        let mut gone = 0;
        // The newest one stays, so that numbers only rise.
        for point in all.into_iter().filter(|point| Some(point.no) != newest) {
            let no = point.no;
            // What nobody in the group has a part in may be wanted again, as long as it is there.
            if of_members(&point, group).is_some_and(|point| is_there(&point, &there))
                || is_there(&point, &there)
            {
                continue;
            }
            let path = self.dir.join(id.to_string()).join(format!("{no:016}.json"));
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(GroupPointError::Disk { path, source });
                }
                _ => gone += 1,
            }
            if let Some(points) = self.groups().get_mut(&id) {
                points.remove(&no);
            }
        }
        Ok(gone)
    }

    /// The group is gone for good; so is what was recorded of it. Its members' points stay. Blocks.
    pub fn forget(&self, group: GroupId) -> Result<(), GroupPointError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.groups().remove(&group);
        let path = self.dir.join(group.to_string());
        match fs::remove_dir_all(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(GroupPointError::Disk { path, source })
            }
            _ => Ok(()),
        }
    }

    /// Those of a group, as far as they are about VMs that are in it.
    fn recorded(&self, group: &Group) -> Vec<GroupPoint> {
        self.all(group.id).iter().filter_map(|point| of_members(point, group)).collect()
    }

    fn all(&self, group: GroupId) -> Vec<GroupPoint> {
        self.groups().get(&group).map(|points| points.values().cloned().collect()).unwrap_or_default()
    }

    /// The members' points that are part of a whole group point: what retention counts by.
    pub fn seqs_of(&self, group: GroupId, vm: VmId) -> BTreeSet<Seq> {
        let groups = self.groups();
        let members =
            groups.get(&group).into_iter().flat_map(BTreeMap::values).flat_map(|point| &point.members);
        members.filter(|member| member.vm == vm).map(|member| member.seq).collect()
    }

    /// The members' points that are whole, and those that are there at all.
    async fn there(&self, points: &[GroupPoint]) -> Result<(Points, Points), GroupPointError> {
        let vms: BTreeSet<VmId> =
            points.iter().flat_map(|point| &point.members).map(|member| member.vm).collect();
        let (mut whole, mut there) = (Points::new(), Points::new());
        for vm in vms {
            for point in self.store.points(Some(vm)).await? {
                there.insert((vm, point.point));
                if point.state == PointState::Ok {
                    whole.insert((vm, point.point));
                }
            }
        }
        Ok((whole, there))
    }

    fn groups(&self) -> std::sync::MutexGuard<'_, BTreeMap<GroupId, BTreeMap<u64, GroupPoint>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without VMs that have left the group; `None` if nobody is left.
fn of_members(point: &GroupPoint, group: &Group) -> Option<GroupPoint> {
    let mut point = point.clone();
    point.members.retain(|of| group.has(of.vm));
    (!point.members.is_empty()).then_some(point)
}

fn holds_all(point: &GroupPoint, group: &Group) -> bool {
    let holds = |vm: VmId| point.members.iter().any(|of| of.vm == vm);
    group.members.iter().all(|member| holds(member.vm))
}

type Points = BTreeSet<(VmId, PointId)>;

fn is_there(point: &GroupPoint, there: &Points) -> bool {
    point.members.iter().all(|member| there.contains(&(member.vm, member.point)))
}

#[cfg(test)]
mod tests;
