//! Times of the week in which another bandwidth limit holds, in the host's local time. The one reader of time zones.
//! Promises: every instant has exactly one limit, also in the hour that a change of the clocks skips or repeats, because
//! instants are turned into local times and never the other way. Called by the agent's configuration and its link.

use crate::units::{BitRate, UnixMs};
use jiff::{Timestamp, civil::Weekday, tz::TimeZone};

/// One such time: `from = "08:00" to = "18:00" days = "mon-fri" limit = "20Mbit"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// One bit a day, Monday the lowest: those on which it begins.
    days: u8,
    /// Minutes after midnight. If it does not end later than it begins, it ends on the next day.
    from: u16,
    to: u16,
    /// `None` is no limit.
    limit: Option<BitRate>,
}

/// What an operator wrote can't be a window; `key` is the one to mend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {given}: {why}")]
pub struct WindowError {
    pub key: &'static str,
    pub given: String,
    pub why: String,
}

/// The place whose clocks windows go by.
#[derive(Clone, Debug)]
pub struct Zone(TimeZone);

impl Window {
    pub fn parse(from: &str, to: &str, days: &str, limit: &str) -> Result<Self, WindowError> {
        let refuse = |key, given: &str, why: String| WindowError { key, given: given.to_owned(), why };
        let clock = |key, text: &str| {
            minutes(text).ok_or_else(|| {
                refuse(key, text, "write hours and minutes of the host's local time: `08:00`".into())
            })
        };
        let (from_minute, to_minute) = (clock("from", from)?, clock("to", to)?);
        if from_minute == DAY {
            return Err(refuse("from", from, "a window begins at `23:59` at the latest".into()));
        }
        let days = days_of(days)
            .ok_or_else(|| refuse("days", days, "write days like `mon-fri`, `sat,sun` or `daily`".into()))?;
        let limit = match limit {
            "none" => None,
            rate => Some(rate.parse().map_err(|error| refuse("limit", rate, format!("{error}, or `none`")))?),
        };
        Ok(Self { days, from: from_minute, to: to_minute, limit })
    }

    fn holds(&self, weekday: u8, minute: u16) -> bool {
        let begins_on = |day: u8| self.days & (1 << (day % 7)) != 0;
        if self.from < self.to {
            return begins_on(weekday) && (self.from..self.to).contains(&minute);
        }
        (begins_on(weekday) && minute >= self.from) || (begins_on(weekday + 6) && minute < self.to)
    }
}

impl Zone {
    /// The host's.
    pub fn local() -> Self {
        Self(TimeZone::system())
    }

    pub fn utc() -> Self {
        Self(TimeZone::UTC)
    }

    /// Minute of the day at an instant.
    pub fn minute_at(&self, now: UnixMs) -> u16 {
        self.at(now).1
    }

    /// Day of the week (Monday is 0) and minute of the day at an instant.
    fn at(&self, now: UnixMs) -> (u8, u16) {
        let now = i64::try_from(now.0).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        let local = now.unwrap_or(Timestamp::UNIX_EPOCH).to_zoned(self.0.clone());
        let minute = u16::from(local.hour().unsigned_abs()) * 60 + u16::from(local.minute().unsigned_abs());
        (day_of(local.weekday()), minute)
    }
}

/// The limit at an instant: that of the first window that holds then, or else `otherwise`.
pub fn limit_at(windows: &[Window], otherwise: Option<BitRate>, now: UnixMs, zone: &Zone) -> Option<BitRate> {
    if windows.is_empty() {
        return otherwise;
    }
    let (weekday, minute) = zone.at(now);
    windows.iter().find(|window| window.holds(weekday, minute)).map_or(otherwise, |window| window.limit)
}

/// `08:00` to `24:00`, in minutes.
pub fn minutes(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    let number = |digits: &str| {
        let two = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit());
        two.then(|| digits.parse::<u16>().ok()).flatten()
    };
    let (hour, minute) = (number(hour)?, number(minute)?);
    let total = hour * 60 + minute;
    (minute < 60 && total <= DAY).then_some(total)
}

fn days_of(text: &str) -> Option<u8> {
    if text == "daily" {
        return Some(0x7f);
    }
    let day = |name: &str| NAMES.iter().position(|known| *known == name).map(|at| at as u8);
    let mut days = 0;
    for part in text.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (mut at, last) = (day(first.trim())?, day(last.trim())?);
        days |= 1 << at;
        while at != last {
            at = (at + 1) % 7;
            days |= 1 << at;
        }
    }
    Some(days)
}

fn day_of(weekday: Weekday) -> u8 {
    weekday.to_monday_zero_offset().unsigned_abs()
}

const NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const DAY: u16 = 24 * 60;

#[cfg(test)]
mod tests {
    use super::*;

    /// Central Europe by its rule, so that no time zone files are needed.
    fn zone() -> Zone {
        Zone(TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap())
    }

    fn at(utc: &str) -> UnixMs {
        UnixMs(utc.parse::<Timestamp>().unwrap().as_millisecond() as u64)
    }

    fn limit(windows: &[Window], utc: &str) -> Option<u64> {
        limit_at(windows, Some(BitRate(50_000_000)), at(utc), &zone()).map(|rate| rate.0 / 1_000_000)
    }

    #[test]
    fn a_window_holds_on_its_days_from_its_first_minute_to_before_its_last() {
        let work = [Window::parse("08:00", "18:00", "mon-fri", "20Mbit").unwrap()];
        // 2026-11-23 is a Monday; UTC+1.
        for (utc, expected) in [
            ("2026-11-23T06:59:59Z", 50),
            ("2026-11-23T07:00:00Z", 20),
            ("2026-11-23T16:59:59Z", 20),
            ("2026-11-23T17:00:00Z", 50),
            ("2026-11-22T12:00:00Z", 50),
            ("2026-11-27T12:00:00Z", 20),
            ("2026-11-28T12:00:00Z", 50),
        ] {
            assert_eq!(limit(&work, utc), Some(expected), "{utc}");
        }
    }

    #[test]
    fn a_window_over_midnight_belongs_to_the_day_on_which_it_begins() {
        let night = [Window::parse("22:00", "06:00", "fri,sat", "none").unwrap()];
        for (utc, expected) in [
            ("2026-11-27T20:59:00Z", Some(50)),
            ("2026-11-27T21:00:00Z", None),
            ("2026-11-28T04:59:00Z", None),
            ("2026-11-28T05:00:00Z", Some(50)),
            ("2026-11-29T04:00:00Z", None),
            ("2026-11-29T21:00:00Z", Some(50)),
            ("2026-11-30T04:00:00Z", Some(50)),
        ] {
            assert_eq!(limit(&night, utc), expected, "{utc}");
        }
        let whole = [Window::parse("00:00", "24:00", "daily", "1Mbit").unwrap()];
        assert_eq!(limit(&whole, "2026-11-23T23:00:00Z"), Some(1));
    }

    #[test]
    fn the_hour_that_a_change_of_the_clocks_skips_or_repeats_has_one_limit_at_each_instant() {
        let night = [Window::parse("02:30", "03:30", "sun", "5Mbit").unwrap()];
        for (utc, expected) in [
            // 02:00 becomes 03:00 at 01:00 UTC.
            ("2026-03-29T00:59:00Z", 50),
            ("2026-03-29T01:00:00Z", 5),
            ("2026-03-29T01:30:00Z", 50),
            // 03:00 becomes 02:00 at 01:00 UTC: half past two comes twice.
            ("2026-10-25T00:29:00Z", 50),
            ("2026-10-25T00:30:00Z", 5),
            ("2026-10-25T01:00:00Z", 50),
            ("2026-10-25T01:30:00Z", 5),
            ("2026-10-25T02:30:00Z", 50),
        ] {
            assert_eq!(limit(&night, utc), Some(expected), "{utc}");
        }
    }

    #[test]
    fn the_first_window_that_holds_counts() {
        let windows = [
            Window::parse("12:00", "13:00", "daily", "30Mbit").unwrap(),
            Window::parse("08:00", "18:00", "daily", "20Mbit").unwrap(),
        ];
        assert_eq!(limit(&windows, "2026-11-23T11:30:00Z"), Some(30));
        assert_eq!(limit(&windows, "2026-11-23T10:30:00Z"), Some(20));
    }

    #[test]
    fn nonsense_is_refused_with_the_key_and_what_would_do() {
        for (from, to, days, limit, key, example) in [
            ("8", "18:00", "mon", "1Mbit", "from", "08:00"),
            ("08:60", "18:00", "mon", "1Mbit", "from", "08:00"),
            ("24:00", "18:00", "mon", "1Mbit", "from", "23:59"),
            ("08:00", "24:01", "mon", "1Mbit", "to", "08:00"),
            ("08:00", "+9:00", "mon", "1Mbit", "to", "08:00"),
            ("08:00", "18:00", "monday", "1Mbit", "days", "mon-fri"),
            ("08:00", "18:00", "", "1Mbit", "days", "mon-fri"),
            ("08:00", "18:00", "mon", "fast", "limit", "50Mbit"),
        ] {
            let error = Window::parse(from, to, days, limit).unwrap_err();
            assert_eq!(error.key, key, "{error}");
            assert!(error.to_string().contains(example), "{error}");
        }
        assert_eq!(days_of("fri-mon"), days_of("fri,sat,sun,mon"));
    }
}
