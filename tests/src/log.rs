//! What the daemons wrote in their logs, read back: when something happened, and the values that came with it.
//! Called by the demo and the bench.

use jiff::Timestamp;

/// One line of a daemon's log.
#[derive(Clone, Copy, Debug)]
pub struct LogLine<'a>(&'a str);

impl<'a> LogLine<'a> {
    /// The lines of `log` that say `what`.
    pub fn saying<'b>(log: &'a str, what: &'b str) -> impl Iterator<Item = Self> + use<'a, 'b> {
        log.lines().filter(move |line| line.contains(what)).map(Self)
    }

    /// When it was written, in milliseconds since 1970.
    pub fn at(self) -> Option<u64> {
        let stamp: Timestamp = self.0.split_whitespace().next()?.parse().ok()?;
        u64::try_from(stamp.as_millisecond()).ok()
    }

    /// The value of `key=` up to the next blank.
    pub fn value(self, key: &str) -> Option<&'a str> {
        self.0.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    pub fn number(self, key: &str) -> Option<u64> {
        self.value(key)?.parse().ok()
    }

    /// The value of `key=` up to the end of the line.
    pub fn rest(self, key: &str) -> Option<&'a str> {
        let (_, rest) = self.0.split_once(key)?;
        rest.strip_prefix('=')
    }
}

#[cfg(test)]
mod tests {
    use super::LogLine;

    const LOG: &str = "2026-01-31T12:00:00.250000Z  INFO point is durable vm=web point=ab latency_ms=70\n\
        2026-01-31T12:00:01.000000Z  INFO failover step=restoring disk vda\nnoise\n";

    #[test]
    fn time_and_values_of_a_line_are_found() {
        let Some(line) = LogLine::saying(LOG, "point is durable").next() else { panic!("not found") };
        assert_eq!((line.number("latency_ms"), line.value("point")), (Some(70), Some("ab")));
        assert_eq!(line.at(), Some(1_769_860_800_250));
        let step = LogLine::saying(LOG, "failover").next().and_then(|line| line.rest("step"));
        assert_eq!(step, Some("restoring disk vda"));
        assert!(LogLine::saying(LOG, "noise").all(|line| line.at().is_none()));
    }
}
