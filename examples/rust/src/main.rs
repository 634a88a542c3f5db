//! Parley from Rust: the story that each example here tells.

use std::env;
use std::error::Error;
use std::time::Duration;

use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::StatusExt;
use uuid::Uuid;

use parley::conversation_service_client::ConversationServiceClient;
use parley::event_service_client::EventServiceClient;
use parley::message::Role;
use parley::message_service_client::MessageServiceClient;
use parley::participant_service_client::ParticipantServiceClient;
use parley::user_service_client::UserServiceClient;
use parley::watch_request::{Scope, Start};
use parley::{
    AcceptInvitationRequest, Conversation, CreateConversationRequest, CreateUserRequest,
    InviteParticipantRequest, ListMessagesRequest, Message, SendMessageRequest, User, WatchRequest,
    WatchResponse,
};

#[allow(clippy::all)]
mod parley {
    tonic::include_proto!("parley.v1");
}

/// Of one attempt.
const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = env::var("PARLEY_ADDRESS")?;
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_lazy();
    let run = &Uuid::new_v4().to_string()[..8];
    let story = Story {
        users: UserServiceClient::new(channel.clone()),
        conversations: ConversationServiceClient::new(channel.clone()),
        participants: ParticipantServiceClient::new(channel.clone()),
        messages: MessageServiceClient::new(channel.clone()),
        events: EventServiceClient::new(channel),
        token: format!("Bearer {}", env::var("PARLEY_TOKEN")?).parse()?,
        ada: format!("ada-{run}"),
        ben: format!("ben-{run}"),
        slug: format!("lunch-{run}"),
    };
    story.meet().await?;
    story.invite().await?;
    story.talk().await?;
    story.collide().await?;
    story.page_back().await?;
    story.follow().await?;
    Ok(())
}

/// Makes a unary call, and again while the server is unavailable, at most five times in all. This
/// is what clients/service-config.json says: tonic, unlike other gRPC, does not read such a file.
async fn retried<T>(call: impl AsyncFn() -> Result<Response<T>, Status>) -> Result<T, Status> {
    let mut pause = Duration::from_millis(100);
    for _ in 1..5 {
        match call().await {
            Err(status) if status.code() == Code::Unavailable => tokio::time::sleep(pause).await,
            answered => return answered.map(Response::into_inner),
        }
        pause = (2 * pause).min(Duration::from_secs(2));
    }
    call().await.map(Response::into_inner)
}

/// Why the server refused a call, to branch on; empty where it did not say.
fn reason(status: &Status) -> String {
    status
        .get_details_error_info()
        .map_or_else(String::new, |info| info.reason)
}

fn fresh_id() -> String {
    Uuid::new_v4().to_string()
}

struct Story {
    users: UserServiceClient<Channel>,
    conversations: ConversationServiceClient<Channel>,
    participants: ParticipantServiceClient<Channel>,
    messages: MessageServiceClient<Channel>,
    events: EventServiceClient<Channel>,
    token: AsciiMetadataValue,
    ada: String,
    ben: String,
    slug: String,
}

impl Story {
    /// Says who calls, and for which user; for none, the caller is the system.
    fn acting_as<T>(&self, actor: &str, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request
            .metadata_mut()
            .insert("authorization", self.token.clone());
        if !actor.is_empty() {
            let actor = actor.parse().expect("our names are ASCII");
            request.metadata_mut().insert("x-parley-actor", actor);
        }
        request
    }

    /// The same for a unary call, which is bounded; a stream lasts as long as it is wanted.
    fn bounded<T>(&self, actor: &str, message: T) -> Request<T> {
        let mut request = self.acting_as(actor, message);
        request.set_timeout(DEADLINE);
        request
    }

    /// Makes two users, which only the system may, and a conversation of one of them.
    async fn meet(&self) -> Result<(), Status> {
        for username in [&self.ada, &self.ben] {
            let user = User {
                username: username.clone(),
                ..Default::default()
            };
            let request = CreateUserRequest {
                user: Some(user),
                request_id: fresh_id(),
                ..Default::default()
            };
            retried(async || {
                self.users
                    .clone()
                    .create_user(self.bounded("", request.clone()))
                    .await
            })
            .await?;
        }
        println!("users: {} and {}", self.ada, self.ben);

        self.create(&self.slug).await?;
        println!("conversation: {}", self.slug);
        Ok(())
    }

    async fn create(&self, slug: &str) -> Result<(), Status> {
        let conversation = Conversation {
            slug: slug.into(),
            title: "Lunch".into(),
            ..Default::default()
        };
        let request = CreateConversationRequest {
            conversation: Some(conversation),
            request_id: fresh_id(),
            ..Default::default()
        };
        retried(async || {
            let request = self.bounded(&self.ada, request.clone());
            self.conversations
                .clone()
                .create_conversation(request)
                .await
        })
        .await?;
        Ok(())
    }

    /// Brings Ben in: Ada asks, he accepts.
    async fn invite(&self) -> Result<(), Status> {
        let invite = InviteParticipantRequest {
            conversation_id: self.slug.clone(),
            user_id: self.ben.clone(),
            request_id: fresh_id(),
            ..Default::default()
        };
        let invited = retried(async || {
            let request = self.bounded(&self.ada, invite.clone());
            self.participants.clone().invite_participant(request).await
        })
        .await?;
        println!(
            "invited: {}",
            invited
                .participant
                .unwrap_or_default()
                .status()
                .as_str_name()
        );

        let accept = AcceptInvitationRequest {
            conversation_id: self.slug.clone(),
            request_id: fresh_id(),
            ..Default::default()
        };
        let accepted = retried(async || {
            let request = self.bounded(&self.ben, accept.clone());
            self.participants.clone().accept_invitation(request).await
        })
        .await?;
        println!(
            "accepted: {}",
            accepted
                .participant
                .unwrap_or_default()
                .status()
                .as_str_name()
        );
        Ok(())
    }

    /// Sends a message twice under one request_id, as if the answer had been lost: it is one.
    async fn talk(&self) -> Result<(), Status> {
        let request_id = fresh_id();
        let first = self.send(&self.ada, "Lunch?", &request_id).await?;
        let again = self.send(&self.ada, "Lunch?", &request_id).await?;
        println!("sent: {} {}", first.sequence, first.content);
        println!("sent again: {} {}", again.sequence, again.content);

        self.send(&self.ben, "At one.", &fresh_id()).await?;
        self.send(&self.ada, "Where?", &fresh_id()).await?;
        self.send(&self.ben, "The usual place.", &fresh_id())
            .await?;
        self.send(&self.ada, "See you.", &fresh_id()).await?;
        Ok(())
    }

    async fn send(&self, sender: &str, content: &str, request_id: &str) -> Result<Message, Status> {
        let request = SendMessageRequest {
            conversation_id: self.slug.clone(),
            role: Role::User.into(),
            content: content.into(),
            request_id: request_id.into(),
            ..Default::default()
        };
        let response = retried(async || {
            self.messages
                .clone()
                .send_message(self.bounded(sender, request.clone()))
                .await
        })
        .await?;
        Ok(response.message.unwrap_or_default())
    }

    /// Asks for a slug that is taken: the status tells the kind of error, the reason which.
    async fn collide(&self) -> Result<(), Status> {
        match self.create(&self.slug).await {
            Err(status) if reason(&status) == "SLUG_TAKEN" => {
                let other = format!("{}-2", self.slug);
                self.create(&other).await?;
                println!("refused: SLUG_TAKEN, so {other}");
                Ok(())
            }
            result => result,
        }
    }

    /// Reads from the newest message to the first; the last page has no next_page_token.
    async fn page_back(&self) -> Result<(), Status> {
        let mut request = ListMessagesRequest {
            conversation_id: self.slug.clone(),
            page_size: 2,
            ..Default::default()
        };
        loop {
            let page = retried(async || {
                self.messages
                    .clone()
                    .list_messages(self.bounded(&self.ada, request.clone()))
                    .await
            })
            .await?;
            let line = |message: &Message| format!("{} {}", message.sequence, message.content);
            let lines: Vec<_> = page.messages.iter().map(line).collect();
            println!("page: {}", lines.join(" | "));
            if page.next_page_token.is_empty() {
                return Ok(());
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Watches from the first event on, is cut off, and goes on from the cursor.
    async fn follow(&self) -> Result<(), Status> {
        let mut stream = self.watch(Start::Oldest(true)).await?;
        let live = self.send(&self.ben, "On my way.", &fresh_id()).await?;
        let cursor = read_until(&mut stream, &live).await?;
        drop(stream); // which ends the call
        println!("cut");

        let missed = self.send(&self.ben, "Here I am.", &fresh_id()).await?;
        let mut stream = self.watch(Start::ResumeCursor(cursor)).await?;
        read_until(&mut stream, &missed).await?;
        Ok(())
    }

    async fn watch(&self, start: Start) -> Result<Streaming<WatchResponse>, Status> {
        let request = WatchRequest {
            scope: Some(Scope::ConversationId(self.slug.clone())),
            start: Some(start),
            ..Default::default()
        };
        retried(async || {
            self.events
                .clone()
                .watch(self.acting_as(&self.ada, request.clone()))
                .await
        })
        .await
    }
}

/// Prints events until the message has come. The cursor stands behind all events of its response:
/// keep it only when they are dealt with.
async fn read_until(
    stream: &mut Streaming<WatchResponse>,
    message: &Message,
) -> Result<String, Status> {
    while let Some(response) = stream.message().await? {
        for event in &response.events {
            println!("event: {} {}", event.version, event.r#type().as_str_name());
        }
        if response
            .events
            .iter()
            .any(|event| event.sequence == message.sequence)
        {
            return Ok(response.cursor);
        }
    }
    Err(Status::aborted("the watch ended"))
}
