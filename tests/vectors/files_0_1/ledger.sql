BEGIN TRANSACTION;
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "about" VALUES('format','2');
INSERT INTO "about" VALUES('identity','{"host": "h", "job": 1}');
CREATE TABLE blank (tile TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE failed (tile TEXT PRIMARY KEY, reason TEXT NOT NULL);
CREATE TABLE quarantine (
    message TEXT PRIMARY KEY, tile TEXT, body TEXT NOT NULL, reason TEXT NOT NULL, poison INTEGER NOT NULL
);
CREATE TABLE runs (run TEXT PRIMARY KEY, begun REAL NOT NULL, ended REAL NOT NULL, counts TEXT NOT NULL);
CREATE TABLE tiles (
    tile TEXT PRIMARY KEY, chunk TEXT NOT NULL, message TEXT NOT NULL, state INTEGER NOT NULL, done_at REAL
) WITHOUT ROWID;
INSERT INTO "tiles" VALUES('a','c','m',3,NULL);
CREATE TABLE unanswered (
    request TEXT NOT NULL, chunk TEXT NOT NULL, since TEXT NOT NULL, is_lost INTEGER NOT NULL,
    PRIMARY KEY (request, chunk)
) WITHOUT ROWID;
CREATE INDEX tiles_of_chunk ON tiles (chunk, state);
CREATE INDEX quarantine_of_tile ON quarantine (tile);
COMMIT;
