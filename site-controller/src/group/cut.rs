//! One cut of several VMs, decided: what agents say goes in, orders come out. The conversation stands in
//! [`lifeboat::wire::order`].
//! Promises: the cut is whole only if every member stood at one instant and has a point of it; nobody is waited for longer
//! than the bounds here say; members of a group's cut that does not become whole get points of their own; a final cut
//! becomes whole or is called off. Pure: time comes in as milliseconds. Called by `coordinator`.

use lifeboat::{
    id::{PointId, VmId},
    units::UnixMs,
    wire::order::{CutKind, CutOrder, Part},
};
use std::collections::{BTreeMap, BTreeSet};

/// An order, and to whom.
pub type Order = (VmId, CutOrder);

/// How a member's part stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Member {
    Asked,
    Ready,
    /// Ready, and its file systems are frozen, if that is possible.
    Frozen,
    Stands,
    Cut {
        point: PointId,
        together: bool,
        pause_us: u64,
    },
    Held {
        point: PointId,
    },
    Out {
        why: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Preparing,
    Freezing,
    Stopping,
    /// Nobody is waited for at the barrier any more; `together`: all stood.
    Going {
        together: bool,
    },
}

/// What became of a cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All stood at one instant; the point of each, and how long it stood.
    Whole { at: UnixMs, skew_us: u64, points: BTreeMap<VmId, (PointId, u64)> },
    /// Not of one instant; why, by member.
    Partial { why: BTreeMap<VmId, String> },
}

/// See the module.
#[derive(Debug)]
pub struct Cut {
    kind: CutKind,
    members: BTreeMap<VmId, Member>,
    /// Those that are told to freeze before anybody stops.
    freezing: BTreeSet<VmId>,
    phase: Phase,
    deadline_ms: u64,
    patience: Patience,
    at: UnixMs,
    first_stood_us: Option<u64>,
    skew_us: u64,
}

/// How long members are waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub ready_ms: u64,
    pub freeze_ms: u64,
    pub stop_ms: u64,
    pub end_ms: u64,
}

impl Cut {
    /// Begins it: the orders with which it begins.
    pub fn begin(
        kind: CutKind,
        members: impl IntoIterator<Item = VmId>,
        patience: Patience,
        now: UnixMs,
    ) -> (Self, Vec<Order>) {
        let members: BTreeMap<VmId, Member> = members.into_iter().map(|vm| (vm, Member::Asked)).collect();
        let prepare = CutOrder::Prepare { kind, within_ms: patience.ready_ms };
        let orders = members.keys().map(|vm| (*vm, prepare)).collect();
        let cut = Self {
            kind,
            members,
            freezing: BTreeSet::new(),
            phase: Phase::Preparing,
            deadline_ms: now.0.saturating_add(patience.ready_ms),
            patience,
            at: now,
            first_stood_us: None,
            skew_us: 0,
        };
        (cut, orders)
    }

    /// Members whose file systems are frozen for it.
    pub fn freezing(mut self, members: impl IntoIterator<Item = VmId>) -> Self {
        self.freezing = members.into_iter().filter(|vm| self.members.contains_key(vm)).collect();
        self
    }

    /// What an agent said; `us` is the site's clock, for the skew.
    pub fn heard(&mut self, vm: VmId, part: Part, now: UnixMs, us: u64) -> Vec<Order> {
        let Some(member) = self.members.get_mut(&vm) else { return Vec::new() };
        match (part, &*member) {
            // What is over for us stays over.
            (_, Member::Out { .. }) => return Vec::new(),
            (Part::Ready, Member::Asked) => *member = Member::Ready,
            (Part::Frozen, Member::Ready) if self.phase == Phase::Freezing => *member = Member::Frozen,
            (Part::Stopped { .. }, Member::Asked | Member::Ready | Member::Frozen) => {
                *member = Member::Stands;
                let first = *self.first_stood_us.get_or_insert(us);
                self.skew_us = us.saturating_sub(first);
            }
            (Part::Cut { point, together, pause_us }, _) => {
                *member = Member::Cut { point, together, pause_us }
            }
            (Part::Held { point }, _) => *member = Member::Held { point },
            (Part::Out { why }, _) => *member = Member::Out { why },
            (Part::HoldEnded { .. }, _) => *member = Member::Out { why: "it is held no more".into() },
            (Part::Ready | Part::Frozen | Part::Stopped { .. }, _) => {}
        }
        self.go_on(now)
    }

    /// A member's host is not connected (any more).
    pub fn lost(&mut self, vm: VmId, now: UnixMs) -> Vec<Order> {
        let why = "its host's agent is not connected".to_owned();
        match self.members.get_mut(&vm) {
            Some(member) if !member.is_over(self.kind) => *member = Member::Out { why },
            _ => return Vec::new(),
        }
        self.go_on(now)
    }

    /// Time has passed.
    pub fn tick(&mut self, now: UnixMs) -> Vec<Order> {
        if now.0 < self.deadline_ms {
            return Vec::new();
        }
        let kind = self.kind;
        let late = match self.phase {
            Phase::Preparing => "it was not ready in time",
            Phase::Freezing => "its file systems were not frozen in time",
            Phase::Stopping => "it did not stand in time",
            Phase::Going { .. } => "its point did not come in time",
        };
        let mut orders = Vec::new();
        for (vm, member) in &mut self.members {
            let is_late = match self.phase {
                Phase::Preparing => *member == Member::Asked,
                Phase::Freezing => *member == Member::Ready && self.freezing.contains(vm),
                Phase::Stopping => matches!(member, Member::Asked | Member::Ready | Member::Frozen),
                Phase::Going { .. } => !member.is_over(kind),
            };
            if is_late {
                // It goes on by itself, and its point is one of its own.
                orders.push((*vm, CutOrder::Go { together: false }));
                *member = Member::Out { why: late.into() };
            }
        }
        orders.extend(self.go_on(now));
        orders
    }

    pub fn deadline(&self) -> UnixMs {
        UnixMs(self.deadline_ms)
    }

    /// Once nothing is waited for any more.
    pub fn outcome(&self) -> Option<Outcome> {
        let Phase::Going { together } = self.phase else { return None };
        if !self.members.values().all(|member| member.is_over(self.kind)) {
            return None;
        }
        let mut why = BTreeMap::new();
        let mut points = BTreeMap::new();
        for (vm, member) in &self.members {
            let apart = match member {
                Member::Cut { point, together: true, pause_us } => {
                    points.insert(*vm, (*point, *pause_us));
                    continue;
                }
                Member::Held { point } => {
                    points.insert(*vm, (*point, 0));
                    continue;
                }
                Member::Cut { .. } => "it did not stand until all did".to_owned(),
                Member::Out { why } => why.clone(),
                Member::Asked | Member::Ready | Member::Frozen | Member::Stands => {
                    "it was not waited for".to_owned()
                }
            };
            why.insert(*vm, apart);
        }
        Some(if together && why.is_empty() {
            Outcome::Whole { at: self.at, skew_us: self.skew_us, points }
        } else {
            Outcome::Partial { why }
        })
    }

    fn go_on(&mut self, now: UnixMs) -> Vec<Order> {
        let out = self.members.values().any(|member| matches!(member, Member::Out { .. }));
        match self.phase {
            Phase::Going { together } if out && together && self.kind == CutKind::Final => self.give_up(now),
            Phase::Going { .. } => Vec::new(),
            // There can be no instant of all any more: the others need not wait.
            Phase::Preparing | Phase::Freezing | Phase::Stopping if out => self.give_up(now),
            Phase::Preparing | Phase::Freezing if !self.all(Member::is_before_the_stop) => self.give_up(now),
            Phase::Preparing if self.all(|member| *member == Member::Ready) && !self.freezing.is_empty() => {
                let mut orders: Vec<_> = self.freezing.iter().map(|vm| (*vm, CutOrder::Freeze)).collect();
                if self.members.len() == 1 {
                    orders.extend(self.stop(now));
                } else {
                    self.phase = Phase::Freezing;
                    self.deadline_ms = now.0.saturating_add(self.patience.freeze_ms);
                }
                orders
            }
            Phase::Preparing if self.all(|member| *member == Member::Ready) => self.stop(now),
            Phase::Freezing
                if self.freezing.iter().all(|vm| self.members.get(vm) == Some(&Member::Frozen)) =>
            {
                self.stop(now)
            }
            Phase::Stopping if !self.members.values().any(Member::is_before_the_stop) => {
                self.phase = Phase::Going { together: true };
                self.deadline_ms = now.0.saturating_add(self.patience.end_ms);
                self.to_all(CutOrder::Go { together: true })
            }
            Phase::Preparing | Phase::Freezing | Phase::Stopping => Vec::new(),
        }
    }

    fn stop(&mut self, now: UnixMs) -> Vec<Order> {
        self.phase = Phase::Stopping;
        self.deadline_ms = now.0.saturating_add(self.patience.stop_ms);
        self.at = now;
        let mut orders = self.to_all(CutOrder::Stop { at: now });
        if self.members.len() == 1 {
            // It meets nobody: no round trip while it stands.
            self.phase = Phase::Going { together: true };
            self.deadline_ms = now.0.saturating_add(self.patience.end_ms);
            orders.extend(self.to_all(CutOrder::Go { together: true }));
        }
        orders
    }

    /// The cut does not become whole.
    fn give_up(&mut self, now: UnixMs) -> Vec<Order> {
        self.phase = Phase::Going { together: false };
        self.deadline_ms = now.0.saturating_add(self.patience.end_ms);
        let order =
            if self.kind == CutKind::Final { CutOrder::CallOff } else { CutOrder::Go { together: false } };
        if self.kind == CutKind::Final {
            for member in self.members.values_mut().filter(|member| !matches!(member, Member::Out { .. })) {
                *member = Member::Out { why: "called off, for another member".into() };
            }
        }
        self.to_all(order)
    }

    fn all(&self, is: impl Fn(&Member) -> bool) -> bool {
        self.members.values().all(is)
    }

    fn to_all(&self, order: CutOrder) -> Vec<Order> {
        self.members.keys().map(|vm| (*vm, order)).collect()
    }
}

impl Member {
    fn is_over(&self, kind: CutKind) -> bool {
        match self {
            Self::Held { .. } | Self::Out { .. } => true,
            Self::Cut { .. } => kind == CutKind::Group,
            Self::Asked | Self::Ready | Self::Frozen | Self::Stands => false,
        }
    }

    fn is_before_the_stop(&self) -> bool {
        matches!(self, Self::Asked | Self::Ready | Self::Frozen)
    }
}

#[cfg(test)]
mod tests;
