//! `lifeboat-agent`: arguments in, rooms wired, wait for the end.

use clap::{Parser, Subcommand};
use lifeboat::{
    config::ConfigError,
    local_api::Client,
    telemetry,
    transport::{
        enrol::{self, EnrolmentToken},
        pki::{AgentName, PkiError},
    },
};
use lifeboat_agent::{
    admin,
    config::{self, AgentConfig},
    daemon,
    protect::status::AgentStatus,
    watchdog::{self, WatchdogArgs},
};
use std::{path::PathBuf, process::ExitCode};

/// Cuts recovery points of running KVM guests and streams them to a recovery site.
///
/// The daemon of a source host. Each protected VM is paused for a moment every few seconds; its memory, devices and disks
/// of that instant travel to the site, as far as they changed. What to protect stands in the configuration file.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
EXAMPLES
  A new host:   lifeboat-agent enrol --site dr.example.com:7443 LB1-…
                $EDITOR /etc/lifeboat/agent.toml      # name the site and the VMs
                systemctl enable --now lifeboat-agent
  Later:        lifeboat-agent status

FILES
  /etc/lifeboat/agent.toml    configuration
  /var/lib/lifeboat/agent     certificates, generations, scratch files
  /run/lifeboat-agent         status socket, marks of guests that are being paused

ENVIRONMENT
  LIFEBOAT_LOG                what is logged: `debug`, or `info,lifeboat::transport=trace`"
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
    /// Show how each VM's protection is doing.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Get this host's certificate from a site, with a token that the site printed.
    Enrol {
        /// The site, as `HOST:PORT`.
        #[arg(long)]
        site: String,
        /// How this host is called at the site; its host name if left out.
        #[arg(long)]
        name: Option<AgentName>,
        /// What `lifeboat-site-controller init` or `token` printed.
        token: EnrolmentToken,
    },
    /// Check the configuration file; unknown keys are errors here.
    CheckConfig,
    /// Resume every guest that an agent paused and did not resume. systemd does this after the service ended.
    ReleasePaused,
    /// Resume guests in time if the agent can't. The agent starts this itself.
    #[command(hide = true)]
    Watchdog(WatchdogArgs),
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lifeboat-agent: {error:#}");
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
    if let Command::Watchdog(args) = arguments.command {
        telemetry::init("info")?;
        return Ok(watchdog::run(args)?);
    }
    let (config, unknown) = match AgentConfig::load(&arguments.config) {
        Ok(loaded) => loaded,
        // Guests are let go whatever state the configuration is in.
        Err(error) if matches!(arguments.command, Command::ReleasePaused) => {
            eprintln!("lifeboat-agent: {error}; going by the defaults");
            AgentConfig::load(std::path::Path::new("/dev/null"))?
        }
        Err(error) => return Err(error.into()),
    };
    let runtime = tokio::runtime::Runtime::new()?;
    match arguments.command {
        Command::Run => {
            telemetry::init("info")?;
            lifeboat::config::warn_of(&unknown);
            runtime.block_on(daemon::run(config))
        }
        Command::Status { json } => {
            let client = Client::new(config.socket(), "lifeboat-agent");
            let status: AgentStatus = runtime.block_on(client.get("/v1/status"))?;
            if json {
                println!("{}", serde_json::to_string_pretty(&status)?);
            } else {
                print!("{}", admin::show(&status));
            }
            Ok(())
        }
        Command::Enrol { site, name, token } => {
            let name = match name {
                Some(name) => name,
                None => daemon::host_name().parse()?,
            };
            let dir = config.identity_dir();
            let enrolled = enrol::enrol(&site, &token, &name, &dir, &config.transport);
            let identity = runtime.block_on(enrolled)?;
            println!(
                "Enrolled as `{}`; the certificate is in {} until {}.",
                identity.name(),
                dir.display(),
                identity.expires()
            );
            if config.site.as_deref() != Some(site.as_str()) {
                println!("Now write this to {}:", arguments.config.display());
                println!("\n  [site]\n  address = \"{site}\"\n\n  [[vm]]\n  name = \"NAME\"\n");
            }
            println!("Then: systemctl enable --now lifeboat-agent");
            Ok(())
        }
        Command::CheckConfig => {
            lifeboat::config::refuse(&arguments.config, &unknown)?;
            println!("{}: ok", arguments.config.display());
            Ok(())
        }
        Command::ReleasePaused => {
            telemetry::init("info")?;
            let args = WatchdogArgs { uri: config.libvirt.clone(), marker_dir: config.marker_dir() };
            daemon::release_paused(&args, true);
            Ok(())
        }
        Command::Watchdog(_) => Ok(()),
    }
}
