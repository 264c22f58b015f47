//! What an operator means by a point. A time means the newest point that was *cut* at or before it, by the source's clock.
//! Promises that damaged points are named, not skipped.

use crate::{
    catalog::CatalogError,
    store::{Ask, PointState, PointSummary, Store},
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

/// The one point of a VM that is meant. Only for the beginning of an id all of them are looked at.
pub async fn select(store: &Store, vm: VmId, selector: &Selector) -> Result<PointSummary, CatalogError> {
    let found = match selector {
        Selector::Latest => {
            let newest = store.find(vm, Ask::Newest).await?;
            if let Some(seed) = newest.as_ref().filter(|newest| newest.seed) {
                return Err(newest_is_seed(seed, store.find(vm, Ask::NewestNoSeed).await?));
            }
            newest
        }
        Selector::AtOrBefore(at) => store.find(vm, Ask::AtOrBefore(*at)).await?,
        Selector::Id(prefix) => by_id(store.points(Some(vm)).await?, prefix)?,
    };
    let Some(found) = found else {
        let oldest = store.find(vm, Ask::Oldest).await?.ok_or(CatalogError::NoPoints { vm })?;
        return Err(match selector {
            Selector::Latest => CatalogError::NoPoints { vm },
            Selector::AtOrBefore(at) => CatalogError::TooEarly { vm, at: *at, oldest: oldest.cut_at },
            Selector::Id(prefix) => CatalogError::NoPoint { vm, given: prefix.clone() },
        });
    };
    let PointState::Damaged(why) = &found.state else { return Ok(found) };
    let instead = match store.find(vm, Ask::WholeBefore(found.seq)).await? {
        Some(whole) => format!("The newest whole point before it is {} of {}", whole.point, whole.cut_at),
        None => "There is no whole point before it".to_owned(),
    };
    Err(CatalogError::Damaged { point: found.point.to_string(), why: why.clone(), instead })
}

fn by_id(points: Vec<PointSummary>, prefix: &str) -> Result<Option<PointSummary>, CatalogError> {
    let mut matching = points.into_iter().filter(|point| point.point.to_string().starts_with(prefix));
    let first = matching.next();
    if let (Some(first), Some(second)) = (&first, matching.next()) {
        let all = [first.clone(), second].into_iter().chain(matching).take(8);
        let choices: Vec<_> = all.map(|point| point.point.to_string()).collect();
        return Err(CatalogError::ManyPoints { given: prefix.into(), choices: choices.join(", ") });
    }
    Ok(first)
}

fn newest_is_seed(seed: &PointSummary, other: Option<PointSummary>) -> CatalogError {
    let instead = match other {
        Some(other) => format!("the newest other one is {} of {}", other.point, other.cut_at),
        None => "there is no other".to_owned(),
    };
    CatalogError::NewestIsSeed { point: seed.point, at: seed.cut_at, instead }
}

const DAY_MS: u64 = 24 * 3600 * 1000;
