//! What an operator means by a point: reading it and choosing. Pure.
//! A time means the newest point that was *cut* at or before it, by the source's clock.

use crate::{
    catalog::CatalogError,
    store::{PointState, PointSummary},
};
use lifeboat::{
    id::VmId,
    units::{Span, UnixMs},
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    Latest,
    /// The beginning of a point's id, lower case.
    Id(String),
    AtOrBefore(UnixMs),
}

impl Selector {
    /// Reads `latest`, RFC 3339, `HH:MM:SS` (UTC; the last time that it was that late), `5m ago`, or part of an id.
    pub fn parse(given: &str, now: UnixMs) -> Result<Self, CatalogError> {
        let text = given.trim();
        let refuse = || CatalogError::Unreadable { given: given.chars().take(80).collect() };
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(span) = text.strip_suffix("ago") {
            let span: Span = span.trim().parse().map_err(|_| refuse())?;
            let back = u64::try_from(span.0.as_millis()).map_err(|_| refuse())?;
            return Ok(Self::AtOrBefore(UnixMs(now.0.saturating_sub(back))));
        }
        if let Ok(at) = text.parse::<jiff::Timestamp>() {
            let ms = u64::try_from(at.as_millisecond()).map_err(|_| refuse())?;
            return Ok(Self::AtOrBefore(UnixMs(ms)));
        }
        if text.contains(':') {
            let time: jiff::civil::Time = text.parse().map_err(|_| refuse())?;
            let since = time.duration_since(jiff::civil::Time::midnight());
            let of_day = u64::try_from(since.as_millis()).map_err(|_| refuse())?;
            let today = now.0 - now.0 % DAY_MS + of_day;
            let at = if today <= now.0 { today } else { today.saturating_sub(DAY_MS) };
            return Ok(Self::AtOrBefore(UnixMs(at)));
        }
        let id = text.to_ascii_lowercase();
        if id.is_empty() || id.len() > 36 || !id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
        {
            return Err(refuse());
        }
        Ok(Self::Id(id))
    }
}

/// The one point of `points` (one VM's, oldest first) that is meant. Damaged points are named, not skipped.
pub fn select<'a>(
    vm: VmId,
    points: &'a [PointSummary],
    selector: &Selector,
) -> Result<&'a PointSummary, CatalogError> {
    let oldest = points.first().ok_or(CatalogError::NoPoints { vm })?;
    let found = match selector {
        Selector::Latest => {
            let newest = points.last();
            if let Some(seed) = newest.filter(|newest| newest.seed) {
                return Err(newest_is_seed(seed, points));
            }
            newest
        }
        Selector::AtOrBefore(at) => {
            let early = points.iter().filter(|point| point.cut_at <= *at && !point.seed);
            let newest = early.max_by_key(|point| (point.cut_at, point.seq));
            Some(newest.ok_or(CatalogError::TooEarly { vm, at: *at, oldest: oldest.cut_at })?)
        }
        Selector::Id(prefix) => {
            let same = |point: &&PointSummary| point.point.to_string().starts_with(prefix.as_str());
            let mut matching = points.iter().filter(same);
            let first = matching.next();
            if let (Some(first), Some(second)) = (first, matching.next()) {
                let all = [first, second].into_iter().chain(matching).take(8);
                let choices: Vec<_> = all.map(|point| point.point.to_string()).collect();
                return Err(CatalogError::ManyPoints { given: prefix.clone(), choices: choices.join(", ") });
            }
            first
        }
    };
    let given = || match selector {
        Selector::Latest => "latest".to_owned(),
        Selector::Id(prefix) => prefix.clone(),
        Selector::AtOrBefore(at) => at.to_string(),
    };
    let found = found.ok_or_else(|| CatalogError::NoPoint { vm, given: given() })?;
    let PointState::Damaged(why) = &found.state else { return Ok(found) };
    let whole = points.iter().rev().find(|point| point.seq < found.seq && point.state == PointState::Ok);
    let instead = match whole {
        Some(whole) => format!("The newest whole point before it is {} of {}", whole.point, whole.cut_at),
        None => "There is no whole point before it".to_owned(),
    };
    Err(CatalogError::Damaged { point: found.point.to_string(), why: why.clone(), instead })
}

fn newest_is_seed(seed: &PointSummary, points: &[PointSummary]) -> CatalogError {
    let instead = match points.iter().rev().find(|point| !point.seed) {
        Some(other) => format!("the newest other one is {} of {}", other.point, other.cut_at),
        None => "there is no other".to_owned(),
    };
    CatalogError::NewestIsSeed { point: seed.point, at: seed.cut_at, instead }
}

const DAY_MS: u64 = 24 * 3600 * 1000;
