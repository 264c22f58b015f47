//! The gate that every request passes: who asks, and whether they may. Promises: what comes over the network does nothing
//! without a token that is good for it; whoever may open the socket may do everything; nothing of a stranger's request but
//! its head is read; a call that changes something is written down ([`super::audit`]) before it acts, and once begun it is
//! brought to its end although its caller went away; whatever goes wrong is answered as an [`ApiError`]. Called by `routes`.

use super::{
    audit::{AuditLog, Call},
    caller::{Caller, Who},
    role::Role,
    token_book::TokenBook,
};
use axum::{
    body::{Body, Bytes},
    extract::{ConnectInfo, Request, State},
    http::{
        HeaderValue, StatusCode,
        header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE},
        request::Parts,
    },
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::MethodRouter,
};
use lifeboat::{
    error::chain,
    fault,
    local_api::{ApiError, ErrorBody, Origin, Words, whole_body},
};
use std::{sync::Arc, time::Duration};

/// What it needs to know.
pub struct Gate {
    pub tokens: TokenBook,
    pub audit: Arc<AuditLog>,
}

/// What a request asks of its caller.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub method: &'static str,
    pub path: &'static str,
    /// The least role that may ask it.
    pub role: Role,
    /// It changes something.
    pub mutating: bool,
}

struct Post {
    rule: Rule,
    gate: Arc<Gate>,
}

/// `handler`, behind the gate.
pub(super) fn guard<S: Clone + Send + Sync + 'static>(
    rule: Rule,
    handler: MethodRouter<S>,
    gate: &Arc<Gate>,
) -> MethodRouter<S> {
    let post = Arc::new(Post { rule, gate: gate.clone() });
    handler.route_layer(from_fn_with_state(post, pass))
}

async fn pass(State(post): State<Arc<Post>>, request: Request, next: Next) -> Response {
    match admit(&post, request).await {
        Ok((caller, head, body)) if post.rule.mutating => act(&post, &caller, head, body, next).await,
        Ok((_, head, body)) => typed(next.run(Request::from_parts(head, Body::from(body))).await).await,
        Err(error) => refusal(error),
    }
}

/// Writes down what is asked, has it done, and writes down how it ended: in a task of its own, that is not dropped with the
/// connection.
async fn act(post: &Post, caller: &Caller, head: Parts, body: Bytes, next: Next) -> Response {
    let outcome = match post.gate.audit.begin(caller, post.rule.call(&head, &body)).await {
        Ok(outcome) => outcome,
        Err(error) => {
            tracing::error!(error = chain(&error), "a call was refused, as it could not be written down");
            let refused =
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "audit-unavailable", Words::of(&error))
                    .with_hint("what can't be written down is not done; make room in data_dir");
            return refusal(refused);
        }
    };
    fault::point("api.written-down");
    let mut request = Request::from_parts(head, Body::from(body));
    request.extensions_mut().insert(outcome.clone());
    let done = tokio::spawn(async move {
        let response = match tokio::spawn(next.run(request)).await {
            Ok(response) => typed(response).await,
            Err(error) => ApiError::internal(error.to_string()).into_response(),
        };
        outcome.answered(response.extensions().get::<ErrorBody>()).await;
        response
    });
    done.await.unwrap_or_else(|error| ApiError::internal(error.to_string()).into_response())
}

/// Who asks, and what: the body is read only once it is known that they may.
async fn admit(post: &Post, request: Request) -> Result<(Caller, Parts, Bytes), ApiError> {
    let (mut head, body) = request.into_parts();
    let caller = post.gate.caller(&head)?;
    if caller.role < post.rule.role {
        let (role, needed) = (caller.role, post.rule.role);
        let message = format!("{caller} has the role {role}; this asks for {needed}");
        let error = ApiError::new(StatusCode::FORBIDDEN, "forbidden", message).with_hint(format!(
            "an admin makes a token for it: `lifeboat token create NAME --role {needed}`"
        ));
        if post.rule.mutating
            && let Err(error) =
                post.gate.audit.refused(&caller, post.rule.call(&head, &[]), &error.body).await
        {
            tracing::error!(error = chain(&error), "a refusal could not be written down");
        }
        return Err(error);
    }
    head.extensions.insert(caller.clone());
    let body = whole_body(body, BODY_MAX, BODY_TIME).await?;
    Ok((caller, head, body))
}

impl Rule {
    fn call(&self, head: &Parts, body: &[u8]) -> Call {
        Call {
            method: self.method.into(),
            route: self.path.into(),
            path: head.uri.path().chars().take(PATH_MAX).collect(),
            body: body.to_vec(),
        }
    }
}

impl Gate {
    fn caller(&self, head: &Parts) -> Result<Caller, ApiError> {
        let origin = head.extensions.get::<ConnectInfo<Origin>>().map(|info| info.0);
        match origin {
            Some(origin @ Origin::Local { uid }) => {
                Ok(Caller { who: Who::Local { uid }, role: Role::Admin, origin })
            }
            Some(origin @ Origin::Network { from }) => {
                let row = bearer(head).and_then(|token| self.tokens.holder(token));
                let row = row.ok_or_else(|| {
                    tracing::debug!(%from, "a caller of the API without a good token");
                    ApiError::new(
                        StatusCode::UNAUTHORIZED,
                        "unauthorized",
                        "there is no such token, or it is no longer good",
                    )
                    .with_hint("an admin makes one at the site: `lifeboat token create NAME --role viewer`")
                })?;
                Ok(Caller { who: Who::Token { name: row.name, id: row.id }, role: row.role, origin })
            }
            // Not served by one of our listeners.
            None => Err(ApiError::internal("nothing is known of where this comes from")),
        }
    }
}

fn bearer(head: &Parts) -> Option<&str> {
    let (scheme, token) = head.headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn refusal(error: ApiError) -> Response {
    let unauthorized = error.status == StatusCode::UNAUTHORIZED;
    let mut response = error.into_response();
    if unauthorized {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// What the server's own parts refuse (a body that is no JSON, say) is told in words; it becomes an error like all others.
async fn typed(response: Response) -> Response {
    let status = response.status();
    let json = response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    if json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let words = match whole_body(response.into_body(), WORDS_MAX, BODY_TIME).await {
        Ok(words) => String::from_utf8_lossy(&words).trim().to_owned(),
        Err(_) => String::new(),
    };
    let message = if words.is_empty() { status.to_string() } else { words };
    ApiError::new(status, "bad-request", message).into_response()
}

/// A group of many VMs takes some 100 KiB.
const BODY_MAX: usize = 1 << 20;
const BODY_TIME: Duration = Duration::from_secs(30);
const WORDS_MAX: usize = 4096;
const PATH_MAX: usize = 500;
