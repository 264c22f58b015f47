//! The sources of a group, through who leads its cuts: the other half of what a group's failover acts on.
//! Promises: a hold counts as ended only on its agent's own word. Called by `group`, through its trait.

use super::group::world::{SourceError, Sources, WholePoint};
use crate::group::{Group, coordinator::Coordinator, points::GroupPoint};
use async_trait::async_trait;
use lifeboat::{
    id::{CutId, GroupId, VmId},
    wire::order::{CutOrder, Part},
};
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;

#[async_trait]
impl Sources for Coordinator {
    async fn points(&self, group: GroupId) -> Result<Vec<WholePoint>, SourceError> {
        let Some(group) = self.book.get(group) else { return Ok(Vec::new()) };
        let points = self.points.offered(&group).await.map_err(told)?;
        Ok(points.into_iter().map(WholePoint::from).collect())
    }

    async fn final_cut(&self, group: &Group, cut: CutId) -> Result<WholePoint, SourceError> {
        Coordinator::final_cut(self, group, cut).await.map(WholePoint::from).map_err(told)
    }

    async fn end_hold(&self, vm: VmId, cut: CutId, order: CutOrder) -> Result<bool, SourceError> {
        let board = self.switchboard();
        let mut words = board.listen();
        if matches!(board.last_of_hold(vm), Some((of, Part::HoldEnded { .. })) if of == cut) {
            return Ok(true);
        }
        if board.order(vm, cut, order).await.is_none() {
            return Ok(false);
        }
        let ended = async {
            loop {
                match words.recv().await {
                    Ok(heard) if heard.vm == vm && heard.cut == cut => {
                        if let Part::HoldEnded { .. } = heard.part {
                            return true;
                        }
                    }
                    // What was missed is asked for again.
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return false,
                }
            }
        };
        Ok(tokio::time::timeout(ANSWERED_WITHIN, ended).await.unwrap_or(false))
    }
}

impl From<GroupPoint> for WholePoint {
    fn from(point: GroupPoint) -> Self {
        let members = point.members.iter().map(|member| (member.vm, member.point)).collect();
        Self { cut: point.cut, cut_at: point.cut_at, members }
    }
}

fn told(error: impl std::fmt::Display) -> SourceError {
    SourceError(error.to_string())
}

/// A guest is shut off, or let go, in far less; after that its agent is asked again.
const ANSWERED_WITHIN: Duration = Duration::from_secs(15);
