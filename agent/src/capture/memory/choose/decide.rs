//! Which engine, given what was found: pure, so that every case can be tried.

use super::{Kind, MemoryMode, PassedOver, pause::BEARABLE};
use crate::capture::memory::Fitness;
use std::time::Duration;

/// How the reason for an engine begins that was asked for by name.
pub const CONFIGURED: &str = "configured so; ";

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// Use it; why, and why not those that are better.
    Use(Kind, String, Vec<PassedOver>),
    /// Points without memory, for this reason.
    DisksOnly(String),
    /// The operator wants memory, and it can't be had for this reason.
    Refuse(String),
}

/// Takes the first engine that fits. `fits` is asked only of those that come into question. `pause` is how long the guest
/// would stand for stop-and-read; where that is bearable, a snapshot's price is not paid.
pub fn decide(
    mode: MemoryMode,
    wanted: Option<Kind>,
    obstacles: &[String],
    pause: Duration,
    fits: impl Fn(Kind) -> Fitness,
) -> Decision {
    let without = |why: String| match mode {
        MemoryMode::On => Decision::Refuse(why),
        MemoryMode::Auto | MemoryMode::Off => Decision::DisksOnly(why),
    };
    if mode == MemoryMode::Off {
        return Decision::DisksOnly(
            "configured so (`memory = \"off\"`); a replica boots from its disks".into(),
        );
    }
    if !obstacles.is_empty() {
        return without(obstacles.join(". "));
    }
    let mut passed_over = Vec::new();
    for kind in Kind::ORDER.into_iter().filter(|kind| wanted.is_none_or(|wanted| wanted == *kind)) {
        let spared = kind == Kind::Snapshot && wanted.is_none() && pause <= BEARABLE;
        let fitness = if spared && fits(Kind::StopAndRead).usable {
            let why = format!("not needed: stop-and-read's pause is about {} ms", pause.as_millis());
            Fitness { usable: false, why }
        } else {
            fits(kind)
        };
        if fitness.usable {
            let why = if wanted.is_some() { format!("{CONFIGURED}{}", fitness.why) } else { fitness.why };
            return Decision::Use(kind, why, passed_over);
        }
        passed_over.push(PassedOver { engine: kind.name().into(), why: fitness.why });
    }
    let reasons: Vec<_> =
        passed_over.iter().map(|PassedOver { engine, why }| format!("{engine}: {why}")).collect();
    without(format!("no memory engine fits ({})", reasons.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(1);

    fn found(usable: bool) -> impl Fn(Kind) -> Fitness {
        move |kind| Fitness { usable, why: format!("{} was probed", kind.name()) }
    }

    #[test]
    fn memory_is_captured_where_an_engine_fits_and_the_reason_is_told_where_none_does() {
        let (auto, on, off) = (MemoryMode::Auto, MemoryMode::On, MemoryMode::Off);
        let best = Kind::ORDER[0];
        let why = format!("{} was probed", best.name());
        assert_eq!(decide(auto, None, &[], LONG, found(true)), Decision::Use(best, why, Vec::new()));
        let Decision::DisksOnly(why) = decide(auto, None, &[], LONG, found(false)) else { panic!() };
        assert!(Kind::ORDER.iter().all(|kind| why.contains(&format!("{0}: {0} was", kind.name()))), "{why}");
        assert!(
            matches!(decide(on, None, &[], LONG, found(false)), Decision::Refuse(refused) if refused == why)
        );
        let obstacle = ["a device".to_owned()];
        assert_eq!(decide(auto, None, &obstacle, LONG, found(true)), Decision::DisksOnly("a device".into()));
        assert_eq!(decide(on, None, &obstacle, LONG, found(true)), Decision::Refuse("a device".into()));
        assert!(matches!(decide(off, None, &[], LONG, found(true)), Decision::DisksOnly(_)));
    }

    #[test]
    fn an_engine_asked_for_by_name_is_the_only_one_looked_at() {
        for kind in Kind::ORDER {
            let only = |other: Kind| Fitness { usable: other == kind, why: "so".into() };
            let decided = decide(MemoryMode::Auto, Some(kind), &[], LONG, only);
            assert_eq!(decided, Decision::Use(kind, "configured so; so".into(), Vec::new()));
            let others = |other: Kind| Fitness { usable: other != kind, why: "so".into() };
            assert!(matches!(decide(MemoryMode::On, Some(kind), &[], LONG, others), Decision::Refuse(_)));
        }
    }

    #[test]
    fn a_snapshot_is_taken_where_reading_would_take_long_or_can_not_be_done() {
        let decide = |pause, read| {
            let usable = |kind| kind == Kind::Snapshot || (read && kind == Kind::StopAndRead);
            let fits = |kind| Fitness { usable: usable(kind), why: "so".into() };
            decide(MemoryMode::Auto, None, &[], pause, fits)
        };
        let is = |decision: &Decision, wanted| matches!(decision, Decision::Use(kind, ..) if *kind == wanted);
        assert!(is(&decide(LONG, true), Kind::Snapshot) && is(&decide(BEARABLE, false), Kind::Snapshot));
        let Decision::Use(Kind::StopAndRead, _, passed_over) = decide(BEARABLE, true) else { panic!() };
        let snapshot = passed_over.iter().find(|other| other.engine == "snapshot");
        assert!(snapshot.is_some_and(|other| other.why.contains("100 ms")), "{passed_over:?}");
    }
}
