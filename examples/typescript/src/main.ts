// Parley from TypeScript: the story that each example here tells.
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";

import { type Channel, createChannel, createClientFactory, Metadata } from "nice-grpc";
import { deadlineMiddleware } from "nice-grpc-client-middleware-deadline";
import { ErrorInfo, errorDetailsClientMiddleware, RichClientError } from "nice-grpc-error-details";

import { ConversationServiceDefinition } from "./gen/parley/v1/conversation.js";
import { EventServiceDefinition, type WatchRequest, type WatchResponse } from "./gen/parley/v1/event.js";
import { type Message, Message_Role, MessageServiceDefinition } from "./gen/parley/v1/message.js";
import { ParticipantServiceDefinition } from "./gen/parley/v1/participant.js";
import { UserServiceDefinition } from "./gen/parley/v1/user.js";

const ADDRESS = process.env.PARLEY_ADDRESS!;
const DEADLINE = 10_000; // milliseconds, of one call with its retries

// Which calls are made again, and when: published with the protos, carried out by gRPC.
const SERVICE_CONFIG = new URL("../../../clients/service-config.json", import.meta.url);

async function main() {
  const serviceConfig = readFileSync(SERVICE_CONFIG, "utf8");
  const channel = createChannel(ADDRESS, undefined, { "grpc.service_config": serviceConfig });
  try {
    const story = new Story(channel, randomUUID().slice(0, 8));
    await story.meet();
    await story.invite();
    await story.talk();
    await story.collide();
    await story.pageBack();
    await story.follow();
  } finally {
    channel.close();
  }
}

/** Says who calls, and for which user; for none, the caller is the system. */
function actingAs(actor?: string) {
  const metadata = Metadata({ authorization: `Bearer ${process.env.PARLEY_TOKEN}` });
  return { metadata: actor ? metadata.set("x-parley-actor", actor) : metadata };
}

/** Why the server refused a call, to branch on; undefined where it did not say. */
function reason(error: unknown) {
  const details = error instanceof RichClientError ? error.extra : [];
  return details.find((detail) => detail.$type === ErrorInfo.$type)?.reason;
}

class Story {
  private readonly users;
  private readonly conversations;
  private readonly participants;
  private readonly messages;
  private readonly events;
  private readonly ada: string;
  private readonly ben: string;
  private readonly slug: string;

  constructor(channel: Channel, run: string) {
    const clients = createClientFactory().use(errorDetailsClientMiddleware).use(deadlineMiddleware);
    const bounded = { "*": { deadline: DEADLINE } };
    this.users = clients.create(UserServiceDefinition, channel, bounded);
    this.conversations = clients.create(ConversationServiceDefinition, channel, bounded);
    this.participants = clients.create(ParticipantServiceDefinition, channel, bounded);
    this.messages = clients.create(MessageServiceDefinition, channel, bounded);
    // A watch lasts as long as it is wanted.
    this.events = clients.create(EventServiceDefinition, channel);
    this.ada = `ada-${run}`;
    this.ben = `ben-${run}`;
    this.slug = `lunch-${run}`;
  }

  /** Makes two users, which only the system may, and a conversation of one of them. */
  async meet() {
    for (const username of [this.ada, this.ben]) {
      await this.users.createUser({ user: { username }, requestId: randomUUID() }, actingAs());
    }
    console.log(`users: ${this.ada} and ${this.ben}`);

    await this.create(this.slug);
    console.log(`conversation: ${this.slug}`);
  }

  async create(slug: string) {
    await this.conversations.createConversation(
      { conversation: { slug, title: "Lunch" }, requestId: randomUUID() },
      actingAs(this.ada),
    );
  }

  /** Brings Ben in: Ada asks, he accepts. */
  async invite() {
    const invited = await this.participants.inviteParticipant(
      { conversationId: this.slug, userId: this.ben, requestId: randomUUID() },
      actingAs(this.ada),
    );
    console.log(`invited: ${invited.participant?.status}`);

    const accepted = await this.participants.acceptInvitation(
      { conversationId: this.slug, requestId: randomUUID() },
      actingAs(this.ben),
    );
    console.log(`accepted: ${accepted.participant?.status}`);
  }

  /** Sends a message twice under one requestId, as if the answer had been lost: it is one. */
  async talk() {
    const requestId = randomUUID();
    const first = await this.send(this.ada, "Lunch?", requestId);
    const again = await this.send(this.ada, "Lunch?", requestId);
    console.log(`sent: ${first.sequence} ${first.content}`);
    console.log(`sent again: ${again.sequence} ${again.content}`);

    await this.send(this.ben, "At one.");
    await this.send(this.ada, "Where?");
    await this.send(this.ben, "The usual place.");
    await this.send(this.ada, "See you.");
  }

  async send(sender: string, content: string, requestId: string = randomUUID()) {
    const { message } = await this.messages.sendMessage(
      { conversationId: this.slug, role: Message_Role.ROLE_USER, content, requestId },
      actingAs(sender),
    );
    return message!;
  }

  /** Asks for a slug that is taken: the status tells the kind of error, the reason which. */
  async collide() {
    try {
      await this.create(this.slug);
    } catch (error) {
      if (reason(error) !== "SLUG_TAKEN") throw error;
      await this.create(`${this.slug}-2`);
      console.log(`refused: SLUG_TAKEN, so ${this.slug}-2`);
    }
  }

  /** Reads from the newest message to the first; the last page has no nextPageToken. */
  async pageBack() {
    let pageToken = "";
    do {
      const page = await this.messages.listMessages(
        { conversationId: this.slug, pageSize: 2, pageToken },
        actingAs(this.ada),
      );
      const lines = page.messages.map(({ sequence, content }) => `${sequence} ${content}`);
      console.log(`page: ${lines.join(" | ")}`);
      pageToken = page.nextPageToken;
    } while (pageToken);
  }

  /** Watches from the first event on, is cut off, and goes on from the cursor. */
  async follow() {
    const stream = this.watch({ $case: "oldest", value: true });
    const live = await this.send(this.ben, "On my way.");
    const cursor = await readUntil(stream, live);
    console.log("cut");

    const missed = await this.send(this.ben, "Here I am.");
    await readUntil(this.watch({ $case: "resumeCursor", value: cursor }), missed);
  }

  watch(start: WatchRequest["start"]) {
    const scope = { $case: "conversationId", value: this.slug } as const;
    return this.events.watch({ scope, start }, actingAs(this.ada));
  }
}

/**
 * Prints events until the message has come; to leave the loop ends the call. The cursor stands
 * behind all events of its response: keep it only when they are dealt with.
 */
async function readUntil(stream: AsyncIterable<WatchResponse>, message: Message) {
  for await (const { events, cursor } of stream) {
    for (const event of events) console.log(`event: ${event.version} ${event.type}`);
    if (events.some((event) => event.sequence === message.sequence)) return cursor;
  }
  throw new Error("The watch ended.");
}

await main();
