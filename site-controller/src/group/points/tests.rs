//! What of a group's instants is offered, whoever has joined it, left it, or lost a point since.

use super::*;
use crate::{
    group::{GroupSpec, MemberVm},
    store::{LocalObjects, testing},
};
use lifeboat::units::ByteSize;
use std::sync::Arc;

const NAMES: [&str; 3] = ["web", "db", "mail"];

fn vm(no: usize) -> VmId {
    VmId::from_bytes([no as u8 + 1; 16])
}

/// With these members.
fn group(of: &[usize]) -> Group {
    let mut group = Group::alone(vm(9), "shop", UnixMs(1));
    let names: Vec<&str> = of.iter().map(|no| NAMES[*no]).collect();
    group.spec = GroupSpec::new("shop", &names);
    group.members = of.iter().map(|no| MemberVm { vm: vm(*no), name: NAMES[*no].into() }).collect();
    group
}

struct Shop {
    points: GroupPoints,
    dir: tempfile::TempDir,
    store: Store,
}

impl Shop {
    /// Two instants of `web` and `db`; of the first one `db`'s point was pruned.
    async fn open() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let objects = LocalObjects::open(&dir.path().join("store"), ByteSize(0)).await.unwrap();
        let (store, _) = testing::open(Arc::new(objects)).await.unwrap();
        let mut of = Vec::new();
        for no in 0..2 {
            let mut guest = testing::Guest::new(no as u64 + 1);
            guest.vm = vm(no);
            let mut parent = None;
            for _ in 0..2 {
                let cut = guest.cut(parent);
                testing::commit(&store, &guest, &cut).await.unwrap();
                parent = Some(cut.point);
                of.push((no, cut.point));
            }
        }
        let points = GroupPoints::open(dir.path().join("group-points"), store.clone()).unwrap();
        let shop = Self { points, dir, store };
        let gone = PointId::from_bytes([0xee; 16]);
        shop.record(1, &[(0, of[0].1), (1, gone)]);
        shop.record(2, &[(0, of[1].1), (1, of[3].1)]);
        shop
    }

    fn record(&self, no: u8, parts: &[(usize, PointId)]) {
        let members = parts.iter().map(|(of, point)| PointOf {
            vm: vm(*of),
            name: NAMES[*of].into(),
            point: *point,
            seq: Seq(u64::from(no)),
            pause_us: 1,
            consistency: None,
        });
        let (version, cut) = (GroupPoint::VERSION, CutId::from_bytes([no; 16]));
        let cut_at = UnixMs(u64::from(no));
        let point = GroupPoint { version, cut, no: 0, cut_at, skew_us: 7, members: members.collect() };
        self.points.record(group(&[0]).id, point).unwrap();
    }

    async fn offered(&self, of: &[usize]) -> Vec<(u64, usize)> {
        let found = self.points.offered(&group(of)).await.unwrap();
        found.iter().map(|point| (point.no, point.members.len())).collect()
    }
}

#[tokio::test]
async fn what_lacks_a_member_is_not_offered_and_who_has_left_takes_nothing_along() {
    let shop = Shop::open().await;
    assert_eq!(shop.offered(&[0, 1]).await, [(2, 2)], "of the first instant a point is gone");
    assert_eq!(shop.offered(&[0, 1, 2]).await, [], "who joined later has no part in it");
    assert_eq!(shop.points.list(&group(&[0, 1, 2])).await.unwrap().len(), 1, "it is listed all the same");
    assert_eq!(shop.offered(&[0]).await, [(1, 1), (2, 1)], "web's points are there, whoever left");
    let select = async |given: &str| shop.points.select(&group(&[0]), &Selector::Id(given.into())).await;
    assert_eq!(select("0202").await.unwrap().map(|point| point.no), Some(2));
    assert!(
        matches!(select("0").await, Err(GroupPointError::Several { count: 2, .. })),
        "it could be either"
    );
    assert_eq!(select("03").await.unwrap(), None);
    let (newest, count) = shop.points.newest(&group(&[0])).await.unwrap();
    assert_eq!((newest.unwrap().no, count), (2, 2));
    assert_eq!(shop.points.tidy(&group(&[0])).await.unwrap(), 0);
    assert_eq!(shop.offered(&[0]).await.len(), 2);
    assert_eq!(shop.points.tidy(&group(&[0, 1])).await.unwrap(), 1, "nobody can use it any more");
    let again = GroupPoints::open(shop.dir.path().join("group-points"), shop.store.clone()).unwrap();
    assert_eq!(again.offered(&group(&[0])).await.unwrap().len(), 1);
}
