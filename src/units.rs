//! Numbers with a meaning, and the one place where operators' spellings of them are read.
//! Promises: no arithmetic on a generation but `next`; parsing refuses what it does not understand and says what would do.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use std::{fmt, str::FromStr, time::Duration};

/// Who may write a VM's history. Only ever rises; a failover raises it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    pub const FIRST: Self = Self(1);
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A point's place in its VM's history: 1, 2, 3 …
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Wall-clock milliseconds since 1970-01-01 UTC.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct UnixMs(pub u64);

impl UnixMs {
    pub fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Nothing, if `before` is later.
    pub fn since(self, before: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(before.0))
    }
}

impl fmt::Display for UnixMs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match i64::try_from(self.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok()) {
            Some(at) => write!(f, "{at:.3}"),
            None => write!(f, "{} ms", self.0),
        }
    }
}

/// What an operator wrote could not be read as a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not {expected}; write for example `{example}`")]
pub struct UnitError {
    pub given: String,
    pub expected: &'static str,
    pub example: &'static str,
}

fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..split].parse().ok()?;
    (number.is_finite() && number >= 0.0).then(|| (number, text[split..].trim()))
}

/// A size in bytes: `64MiB`, `1.5GiB`, `4096`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let refuse = || UnitError { given: text.into(), expected: "a size", example: "64MiB" };
        let (number, unit) = number_and_unit(text).ok_or_else(refuse)?;
        let factor: f64 = match unit {
            "" | "B" => 1.0,
            "KiB" | "K" => 1024.0,
            "MiB" | "M" => 1024.0 * 1024.0,
            "GiB" | "G" => 1024.0 * 1024.0 * 1024.0,
            "TiB" | "T" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            "KB" | "kB" => 1e3,
            "MB" => 1e6,
            "GB" => 1e9,
            "TB" => 1e12,
            _ => return Err(refuse()),
        };
        let bytes = number * factor;
        if bytes > i64::MAX as f64 {
            return Err(refuse());
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 4] =
            [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        for (unit, size) in UNITS {
            if self.0 >= size {
                return write!(f, "{:.1} {unit}", self.0 as f64 / size as f64);
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// A rate in bits a second, as network people write it: `50Mbit`, `1Gbit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct BitRate(pub u64);

impl BitRate {
    pub fn bytes_per_second(self) -> u64 {
        self.0 / 8
    }
}

impl FromStr for BitRate {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let refuse = || UnitError { given: text.into(), expected: "a rate above 8kbit", example: "50Mbit" };
        let (number, unit) = number_and_unit(text).ok_or_else(refuse)?;
        let factor: f64 = match unit {
            "bit" => 1.0,
            "kbit" | "Kbit" => 1e3,
            "Mbit" => 1e6,
            "Gbit" => 1e9,
            _ => return Err(refuse()),
        };
        let bits = number * factor;
        if !(8e3..1e15).contains(&bits) {
            return Err(refuse());
        }
        Ok(Self(bits as u64))
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bits if bits >= 1_000_000_000 => write!(f, "{:.1} Gbit/s", bits as f64 / 1e9),
            bits if bits >= 1_000_000 => write!(f, "{:.1} Mbit/s", bits as f64 / 1e6),
            bits => write!(f, "{:.1} kbit/s", bits as f64 / 1e3),
        }
    }
}

/// A span of time: `500ms`, `5s`, `2m`, `1h`, `7d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let refuse = || UnitError { given: text.into(), expected: "a span of time", example: "5s" };
        let (number, unit) = number_and_unit(text).ok_or_else(refuse)?;
        let seconds = number
            * match unit {
                "ms" => 1e-3,
                "s" => 1.0,
                "m" | "min" => 60.0,
                "h" => 3600.0,
                "d" => 86400.0,
                _ => return Err(refuse()),
            };
        Duration::try_from_secs_f64(seconds).map(Self).map_err(|_| refuse())
    }
}

/// How hard pages are compressed: a zstd level, 0 for not at all; where the two differ, whatever pays between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    pub least: i32,
    pub most: i32,
}

impl Compression {
    /// Chosen by link and CPU. Levels above 9 cost many times as much for little; frames rest at the site as they
    /// travel, so that leaving pages as they are would cost its store, and is for the operator to allow.
    pub const AUTO: Self = Self { least: 1, most: 9 };
    pub const MOST: i32 = 19;

    pub fn fixed(level: i32) -> Self {
        Self { least: level, most: level }
    }
}

impl FromStr for Compression {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let refuse = || UnitError {
            given: text.into(),
            expected: "`auto`, `off`, a zstd level from 1 to 19, or two with a dash between them",
            example: "1-5",
        };
        let level =
            |digits: &str| digits.trim().parse().ok().filter(|level| (0..=Self::MOST).contains(level));
        match text.trim() {
            "auto" => Ok(Self::AUTO),
            "off" => Ok(Self::fixed(0)),
            levels => {
                let (least, most) = levels.split_once('-').unwrap_or((levels, levels));
                let (least, most) = level(least).zip(level(most)).ok_or_else(refuse)?;
                if least <= most { Ok(Self { least, most }) } else { Err(refuse()) }
            }
        }
    }
}

macro_rules! deserialize_from_text {
    ($($name:ty),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
deserialize_from_text!(ByteSize, BitRate, Span, Compression);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_spellings_are_read_and_nonsense_is_refused_with_an_example() {
        assert_eq!("64MiB".parse(), Ok(ByteSize(64 << 20)));
        assert_eq!("1.5GiB".parse(), Ok(ByteSize(3 << 29)));
        assert_eq!("50Mbit".parse(), Ok(BitRate(50_000_000)));
        assert_eq!("500ms".parse(), Ok(Span(Duration::from_millis(500))));
        for bad in ["", "fast", "12", "-5s", "5 parsecs", "1e400s", "9999999999999999999999s"] {
            let error = bad.parse::<Span>().unwrap_err();
            assert!(error.to_string().contains("5s"), "{error}");
        }
        assert!("9999999TiB".parse::<ByteSize>().is_err());
        assert!("1bit".parse::<BitRate>().is_err());
        assert_eq!("1-5".parse(), Ok(Compression { least: 1, most: 5 }));
        assert_eq!(("off".parse(), "3".parse()), (Ok(Compression::fixed(0)), Ok(Compression::fixed(3))));
        for bad in ["", "5-1", "20", "-1", "fast", "1-"] {
            assert!(bad.parse::<Compression>().is_err(), "{bad}");
        }
    }
}
