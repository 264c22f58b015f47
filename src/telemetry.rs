//! Logging: one readable line per event, on stderr. The one home of tracing-subscriber.
//! Promises: under systemd the journal's own time stamps are not doubled and levels reach it; on a terminal there is
//! colour, elsewhere none. `LIFEBOAT_LOG` chooses what is said (`debug`, `info,lifeboat::transport=trace`).

use std::{
    env, fmt,
    io::{self, IsTerminal},
};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Full, Writer},
    },
    registry::LookupSpan,
};

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("{VARIABLE}={given} is no log filter; write for example `debug` or `info,lifeboat=trace`")]
    Filter { given: String },
    #[error("logging has been set up already")]
    Twice,
}

/// Starts logging for this process. What `LIFEBOAT_LOG` does not say is decided by `default` (`info`, say).
pub fn init(default: &str) -> Result<(), TelemetryError> {
    let given = env::var(VARIABLE).ok().filter(|given| !given.is_empty());
    let filter = filter(given.as_deref().unwrap_or(default))?;
    let lines = Lines::for_sink(env::var_os("JOURNAL_STREAM").is_some(), io::stderr().is_terminal());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(matches!(lines, Lines::Terminal(_)))
        .event_format(lines)
        .try_init()
        .map_err(|_| TelemetryError::Twice)
}

fn filter(given: &str) -> Result<EnvFilter, TelemetryError> {
    let refuse = |_| TelemetryError::Filter { given: given.to_owned() };
    EnvFilter::builder().parse(given).map_err(refuse)
}

/// How a line looks, by where it goes.
#[derive(Debug)]
enum Lines {
    /// The journal reads `<level>` from the front of a line and adds the time itself.
    Journal(Format<Full, ()>),
    Terminal(Format),
    File(Format),
}

impl Lines {
    fn for_sink(journal: bool, terminal: bool) -> Self {
        let format = Format::default();
        match (journal, terminal) {
            (_, true) => Self::Terminal(format.with_target(false)),
            (true, false) => {
                Self::Journal(format.without_time().with_level(false).with_target(false).with_ansi(false))
            }
            (false, false) => Self::File(format.with_target(false).with_ansi(false)),
        }
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        match self {
            Self::Journal(format) => {
                write!(writer, "<{}>", priority(*event.metadata().level()))?;
                format.format_event(context, writer, event)
            }
            Self::Terminal(format) | Self::File(format) => format.format_event(context, writer, event),
        }
    }
}

/// The level as syslog numbers it (`sd-daemon(3)`).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

const VARIABLE: &str = "LIFEBOAT_LOG";

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(lines: Lines) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter("info").unwrap())
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .event_format(lines)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(vm = "db1", "late");
            tracing::debug!("not said");
        });
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_journal_gets_levels_and_no_time_and_a_file_gets_both_as_text() {
        assert_eq!(logged(Lines::for_sink(true, false)), "<4>late vm=\"db1\"\n");
        let line = logged(Lines::for_sink(false, false));
        assert!(line.starts_with("20") && line.ends_with("WARN late vm=\"db1\"\n"), "{line}");
    }

    #[test]
    fn a_filter_that_is_none_is_refused_with_an_example() {
        let error = filter("lifeboat=loud").unwrap_err().to_string();
        assert!(error.contains("lifeboat=loud") && error.contains("debug"), "{error}");
    }
}
