//! `lifeboat-site-controller`: arguments in, rooms wired, wait for the end.

use anyhow::Context;
use clap::{Parser, Subcommand};
use lifeboat::{
    config::ConfigError,
    telemetry,
    transport::pki::{AgentName, PkiError, SiteIdentity},
    units::Span,
};
use lifeboat_site_controller::{
    config::{self, SiteConfig},
    daemon, setup,
};
use std::{path::PathBuf, process::ExitCode, time::Duration};

/// Stores recovery points of VMs at this site, and resumes replicas of them on KVM when their own site is lost.
///
/// The daemon of a recovery site. Agents on source hosts stream recovery points to it; operators use the `lifeboat`
/// command to look at them and to fail over.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
EXAMPLES
  A new site:        lifeboat-site-controller init --address dr.example.com
                     systemctl enable --now lifeboat-site-controller
  One more agent:    lifeboat-site-controller token

FILES
  /etc/lifeboat/site.toml    configuration; every key has a default
  /var/lib/lifeboat/site     recovery points, certificates, failover journals

ENVIRONMENT
  LIFEBOAT_LOG               what is logged: `debug`, or `info,lifeboat::transport=trace`"
)]
struct Arguments {
    /// Configuration file.
    #[arg(long, global = true, default_value = config::DEFAULT_FILE)]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon in the foreground (systemd does).
    Run,
    /// Make this site's certificates, and print how to enrol a first agent. Safe to run again.
    Init {
        /// Name or IP address under which agents reach this site; give it again for each further one.
        #[arg(long = "address", required = true, value_name = "HOST")]
        addresses: Vec<String>,
    },
    /// Print a one-time token with which one more agent can enrol.
    Token {
        /// Only an agent of this name may use it.
        #[arg(long)]
        agent: Option<AgentName>,
        /// How long it can be used.
        #[arg(long, default_value = "24h")]
        valid: Span,
    },
    /// Check the configuration file; unknown keys are errors here.
    CheckConfig,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lifeboat-site-controller: {error:#}");
            // 78 tells the service manager that starting again won't help (EX_CONFIG of sysexits.h).
            if error.is::<ConfigError>() || error.is::<PkiError>() {
                ExitCode::from(78)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let (config, unknown) = SiteConfig::load(&arguments.config)?;
    match arguments.command {
        Command::Run => {
            telemetry::init("info")?;
            lifeboat::config::warn_of(&unknown);
            tokio::runtime::Runtime::new()?.block_on(daemon::run(config))
        }
        Command::Init { addresses } => init(&config, &addresses),
        Command::Token { agent, valid } => {
            let identity = SiteIdentity::load(&config.identity_dir()).context("run `init` first")?;
            println!("{}", setup::token(&config, &identity, valid.0, agent)?);
            Ok(())
        }
        Command::CheckConfig => {
            lifeboat::config::refuse(&arguments.config, &unknown)?;
            println!("{}: ok", arguments.config.display());
            Ok(())
        }
    }
}

fn init(config: &SiteConfig, addresses: &[String]) -> anyhow::Result<()> {
    let (identity, made) = setup::init(config, addresses)?;
    let token = setup::token(config, &identity, Duration::from_secs(24 * 3600), None)?;
    let done = if made { "has its certificates" } else { "had its certificates already; they were kept" };
    println!("Site `{}` {done}, in {}.", identity.name(), config.identity_dir().display());
    println!("Its fingerprint is {}", identity.fingerprint());
    println!();
    println!("Start it:            systemctl enable --now lifeboat-site-controller");
    println!("Then, on a source host (the token is good once, for 24 h):");
    println!();
    println!("  lifeboat-agent enrol --site {}:{} {token}", addresses[0], config.listen.port());
    Ok(())
}
