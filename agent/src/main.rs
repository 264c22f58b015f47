//! `lifeboat-agent`: arguments in, rooms wired, wait for the end.

mod fencing;

use clap::{Parser, Subcommand};
use lifeboat::{
    config::ConfigError,
    local_api::{Client, ClientError},
    telemetry,
    transport::{
        enrol::{self, EnrolmentToken},
        pki::{AgentName, PkiError},
    },
    units::Span,
};
use lifeboat_agent::{
    admin::{self, Done, VmRequest, YieldRequest},
    config::{self, AgentConfig},
    daemon,
    fence::{guard, hook},
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
    /// Socket of the running agent, for what asks it something; without it, the one in the configuration's `run_dir`.
    #[arg(long, global = true)]
    socket: Option<PathBuf>,
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
    /// Keep away from a VM for a while: nothing of its QEMU is used, so that others can.
    ///
    /// Returns when nothing is held any more. Dirty bitmaps stay, so that protection goes on with what changed.
    Yield {
        /// Name or UUID.
        vm: String,
        /// How long: `10m`, `2h`.
        #[arg(long = "for", value_name = "TIME", default_value = "1h")]
        time: Span,
    },
    /// End a `yield` early.
    Resume {
        /// Name or UUID.
        vm: String,
    },
    /// Compare a VM with the site's copy from end to end, and send what differs.
    ///
    /// Never needed where all goes well: for when a copy is in doubt. The next point takes longer; older ones stay as
    /// they are.
    Resync {
        /// Name or UUID.
        vm: String,
    },
    /// Let this host's copy of a VM run although the site has not said that it may, or has said that it may not.
    ///
    /// For when the site is lost for good, or its replica is. Make sure that no other copy of the VM runs.
    Allow {
        /// Name or UUID.
        vm: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Let a VM go on that stands for a planned failover, without the site's word.
    ///
    /// For when the site is lost for good in the middle of one. Make sure that no replica of the VM runs.
    ResumeHeld {
        /// Name or UUID.
        vm: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// What only copies know that were failed over: what is kept of them, and what can be done with it.
    Diverged {
        #[command(subcommand)]
        order: Option<DivergedOrder>,
        /// Print JSON.
        #[arg(long, global = true)]
        json: bool,
    },
    /// The hook that has libvirt refuse to start a protected VM before the site has answered.
    Hook {
        #[command(subcommand)]
        order: HookOrder,
        /// Where libvirt looks for hooks.
        #[arg(long, global = true, default_value = hook::DEFAULT_DIR)]
        dir: PathBuf,
    },
    /// End a VM's protection until the agent's next start, and leave nothing of ours in its QEMU.
    Unprotect {
        /// Name or UUID.
        vm: String,
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
    /// Pause guests in time whose leases at the witness ran out, whatever became of the agent. Its service starts this.
    Guard,
    /// Resume guests in time if the agent can't. The agent starts this itself.
    #[command(hide = true)]
    Watchdog(WatchdogArgs),
}

impl Command {
    /// Whether it can do its work, or the running agent can, although the configuration can't be read.
    fn goes_without_configuration(&self) -> bool {
        match self {
            Self::ReleasePaused | Self::Watchdog(_) | Self::Status { .. } => true,
            Self::Yield { .. } | Self::Resume { .. } | Self::Resync { .. } => true,
            Self::Hook { order: HookOrder::Remove, .. } => true,
            // They must find the right folders.
            Self::Allow { .. } | Self::ResumeHeld { .. } | Self::Diverged { .. } | Self::Hook { .. } => false,
            // Without a running agent they go by the configuration.
            Self::Guard | Self::Run | Self::Unprotect { .. } | Self::Enrol { .. } | Self::CheckConfig => {
                false
            }
        }
    }
}

#[derive(Subcommand)]
enum DivergedOrder {
    /// All of them.
    List,
    /// One of them.
    Show {
        /// Name or UUID.
        vm: String,
    },
    /// Give up what is kept of a copy, and end it if it still stands in memory. Its disks stay.
    Discard {
        /// Name or UUID.
        vm: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Let the guest go on from what is kept of it, once it is allowed to run.
    Restore {
        /// Name or UUID.
        vm: String,
    },
}

#[derive(Clone, Copy, Subcommand)]
enum HookOrder {
    /// Put it in place, and tell a libvirt that runs.
    Install,
    /// Take it away.
    Remove,
    /// Whether it is in place.
    Status,
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
        // Guests are let go, and a running agent is asked, whatever state the configuration is in.
        Err(error) if arguments.command.goes_without_configuration() => {
            let (defaults, unknown) = AgentConfig::load(std::path::Path::new("/dev/null"))?;
            eprintln!("lifeboat-agent: {error}");
            match (&arguments.command, &arguments.socket) {
                (Command::ReleasePaused, _) => eprintln!("lifeboat-agent: going by the defaults"),
                (_, Some(_)) => {}
                (_, None) => eprintln!(
                    "lifeboat-agent: looking for the running agent at {}; `--socket` names another place",
                    defaults.socket().display()
                ),
            }
            (defaults, unknown)
        }
        Err(error) => return Err(error.into()),
    };
    let socket = arguments.socket.unwrap_or_else(|| config.socket());
    let client = Client::new(socket, "lifeboat-agent");
    let runtime = tokio::runtime::Runtime::new()?;
    match arguments.command {
        Command::Run => {
            telemetry::init("info")?;
            lifeboat::config::warn_of(&unknown);
            runtime.block_on(daemon::run(config, &arguments.config))
        }
        Command::Status { json } => {
            let status: AgentStatus = runtime.block_on(client.get("/v1/status"))?;
            if json {
                println!("{}", serde_json::to_string_pretty(&status)?);
            } else {
                print!("{}", admin::show(&status));
            }
            Ok(())
        }
        Command::Yield { vm, time } => {
            let for_ms = u64::try_from(time.0.as_millis()).unwrap_or(u64::MAX);
            tell(&runtime, &client, "/v1/yield", &YieldRequest { vm, for_ms, by: caller() })
        }
        Command::Resume { vm } => tell(&runtime, &client, "/v1/resume", &VmRequest { vm }),
        Command::Resync { vm } => tell(&runtime, &client, "/v1/resync", &VmRequest { vm }),
        Command::Allow { vm, yes } => fencing::allow(&config, &vm, yes, &caller()),
        Command::ResumeHeld { vm, yes } => fencing::resume_held(&config, &vm, yes, &caller()),
        Command::Diverged { order, json } => match order.unwrap_or(DivergedOrder::List) {
            DivergedOrder::List => fencing::list(&config, json),
            DivergedOrder::Show { vm } => fencing::show(&config, &vm, json),
            DivergedOrder::Discard { vm, yes } => fencing::discard(&config, &vm, yes),
            DivergedOrder::Restore { vm } => fencing::restore(&config, &vm),
        },
        Command::Hook { order, dir } => match order {
            HookOrder::Install => fencing::install_hook(&config, &dir),
            HookOrder::Remove => fencing::remove_hook(&config, &dir),
            HookOrder::Status => fencing::show_hook(&config, &dir),
        },
        Command::Unprotect { vm } => {
            match tell(&runtime, &client, "/v1/unprotect", &VmRequest { vm: vm.clone() }) {
                Err(error) if matches!(error.downcast_ref(), Some(ClientError::NotRunning { .. })) => {
                    let ran = daemon::leave_now(&config, &vm)?;
                    println!("{vm}: {}", if ran { "nothing is left in its QEMU" } else { "it does not run" });
                    Ok(())
                }
                other => other,
            }
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
        Command::Guard => {
            telemetry::init("info")?;
            Ok(guard::run(&config)?)
        }
        Command::Watchdog(_) => Ok(()),
    }
}

/// Asks the daemon for something and says what it did.
fn tell(
    runtime: &tokio::runtime::Runtime,
    client: &Client,
    path: &str,
    request: &impl serde::Serialize,
) -> anyhow::Result<()> {
    let done: Done = runtime.block_on(client.post(path, request))?;
    println!("{}", done.done);
    Ok(())
}

/// Who gives this command, for status.
fn caller() -> String {
    let names = ["SUDO_USER", "USER", "LOGNAME"].map(std::env::var);
    let name = names.into_iter().flatten().find(|name| !name.is_empty());
    name.unwrap_or_else(|| format!("user {}", nix::unistd::getuid()))
}
