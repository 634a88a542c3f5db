-- What SendMessage writes, as one transaction by hand: the limit of one call at a time.
\set n random(0, 199)
BEGIN;
UPDATE conversations SET last_sequence = last_sequence + 1, version = version + 1,
  last_activity_at = now(), last_message_at = now()
  WHERE external_id = 'pgbench/' || :n::int
  RETURNING id AS conversation, creator_id AS sender, last_sequence AS sequence, version \gset
INSERT INTO messages (conversation_id, sequence, sender_id, role, content, search)
  VALUES (:conversation, :sequence, :sender, 'USER', 'I can bring the projector, if nobody minds.',
          to_tsvector('simple', 'I can bring the projector, if nobody minds.'));
UPDATE participants SET last_read_sequence = :sequence
  WHERE conversation_id = :conversation AND user_id = :sender;
INSERT INTO events (conversation_id, version, era, type, actor_id, sequence, revision, user_id)
  SELECT :conversation, :version, max(era), 'MESSAGE_CREATED', :sender, :sequence, 1, :sender
  FROM eras;
INSERT INTO requests (conversation_id, key, payload_hash, sequence, message_count)
  VALUES (:conversation, uuid_send(gen_random_uuid()), sha256(uuid_send(gen_random_uuid())),
          :sequence, 1);
COMMIT;
