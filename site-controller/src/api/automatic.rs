//! What the site does by itself, in the audit log; and groups that may ask for it.

use super::{
    audit::{AuditLog, Call},
    caller::{Caller, Who},
    role::Role,
    site::Site,
};
use crate::{
    automatic::Scribe,
    group::{GroupSpec, MemberVm},
};
use async_trait::async_trait;
use lifeboat::local_api::{ApiError, ErrorBody, Origin, Words};
use std::sync::Arc;

#[async_trait]
impl Scribe for Arc<AuditLog> {
    async fn begin(&self, group: &str, claim: &str) -> Result<String, String> {
        let caller = Caller { who: Who::Witness, role: Role::Admin, origin: Origin::Local { uid: None } };
        let body = serde_json::json!({ "name": group, "planned": false, "point": "latest", "claim": claim });
        let path = "/v1/group-failovers".to_owned();
        let call =
            Call { method: "POST".into(), route: path.clone(), path, body: body.to_string().into_bytes() };
        let begun = AuditLog::begin(self, &caller, call).await;
        begun.map(|outcome| outcome.id().to_owned()).map_err(|error| lifeboat::error::chain(&error))
    }

    async fn ended(&self, id: String, error: Option<String>) {
        let error =
            error.map(|what| ErrorBody { code: "internal".into(), what, why: None, what_to_do: None });
        self.end_of(id, error.as_ref()).await;
    }
}

/// What is failed over by itself has a witness, and agents that keep it there. `before`: what was asked for already stays.
pub(super) async fn may_ask(
    site: &Site,
    before: Option<(&GroupSpec, &[MemberVm])>,
    spec: &GroupSpec,
    members: &[MemberVm],
) -> Result<(), ApiError> {
    if !spec.automatic {
        return Ok(());
    }
    let Some(automatic) = &site.automatic else {
        let message = "no group is failed over by itself without a witness";
        return Err(ApiError::bad_request("no-witness", message)
            .with_hint("write `[witness]` into site.toml, and into agent.toml of the members' hosts"));
    };
    let known =
        |vm| before.is_some_and(|(spec, old)| spec.automatic && old.iter().any(|member| member.vm == vm));
    let new: Vec<_> = members
        .iter()
        .filter(|member| !known(member.vm))
        .map(|member| (member.vm, member.name.clone()))
        .collect();
    if new.is_empty() {
        return Ok(());
    }
    let left = automatic.not_kept(&new).await;
    let left = left.map_err(|error| ApiError::conflict("not-kept", Words::of(&error)))?;
    if left.is_empty() {
        return Ok(());
    }
    let message = format!("no agent keeps these at the witness: {}", left.join(", "));
    Err(ApiError::conflict("not-kept", message)
        .with_hint("`lifeboat-agent status` on their hosts says why; a VM that is off is not kept"))
}
