//! `difflora doctor`: what works on this machine, what does not, and what to do about it.

use anyhow::{Result, bail};
use serde_json::json;

use crate::commands::output::{Output, print_line};
use crate::diagnostics::{self, Check, Status, models};

/// Arguments of `difflora doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Check that the Hugging Face hub can be reached as well.
    #[arg(long, env = "DIFFLORA_ONLINE")]
    online: bool,
}

/// Prints every finding; fails when one is a problem.
pub fn run(args: &Args, output: &Output) -> Result<()> {
    let mut checks = diagnostics::machine();
    checks.extend(models::folders());
    checks.extend(models::all());
    checks.push(if args.online { models::reachability() } else { models::network() });

    if output.json {
        print_line!("{:#}", json!({ "checks": checks }))?;
    } else {
        checks.iter().try_for_each(print_check)?;
    }
    match checks.iter().filter(|check| check.status == Status::Problem).count() {
        0 => Ok(()),
        1 => bail!("1 problem was found"),
        several => bail!("{several} problems were found"),
    }
}

fn print_check(check: &Check) -> Result<()> {
    let status = match check.status {
        Status::Ok => "ok",
        Status::Note => "note",
        Status::Problem => "problem",
    };
    print_line!("{status:<8} {:<13} {}", check.area, check.text)?;
    match &check.remedy {
        Some(remedy) => print_line!("{:22} → {remedy}", ""),
        None => Ok(()),
    }
}
