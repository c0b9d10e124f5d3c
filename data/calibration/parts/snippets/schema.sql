-- A small ledger: double entry, so that every transaction sums to zero.
CREATE TABLE account (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text NOT NULL UNIQUE,
    kind       text NOT NULL CHECK (kind IN ('asset', 'liability', 'income', 'expense')),
    currency   char(3) NOT NULL DEFAULT 'EUR',
    closed_at  timestamptz
);

CREATE TABLE transaction (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    booked_on   date NOT NULL,
    description text NOT NULL,
    reference   uuid UNIQUE
);

CREATE TABLE entry (
    transaction_id bigint NOT NULL REFERENCES transaction (id) ON DELETE CASCADE,
    account_id     bigint NOT NULL REFERENCES account (id),
    cents          bigint NOT NULL CHECK (cents <> 0),
    PRIMARY KEY (transaction_id, account_id)
);
CREATE INDEX entry_by_account ON entry (account_id) INCLUDE (cents);

CREATE VIEW balance AS
SELECT a.id, a.name, a.currency, COALESCE(SUM(e.cents), 0) / 100.0 AS amount
FROM account AS a
LEFT JOIN entry AS e ON e.account_id = a.id
GROUP BY a.id, a.name, a.currency;

-- Transactions that do not balance; must always be empty.
SELECT t.id, t.description, SUM(e.cents) AS difference
FROM transaction AS t
JOIN entry AS e ON e.transaction_id = t.id
GROUP BY t.id, t.description
HAVING SUM(e.cents) <> 0;

-- Monthly spending per account with a running total.
WITH monthly AS (
    SELECT a.name, date_trunc('month', t.booked_on) AS month, SUM(e.cents) AS cents
    FROM entry AS e
    JOIN transaction AS t ON t.id = e.transaction_id
    JOIN account AS a ON a.id = e.account_id AND a.kind = 'expense'
    GROUP BY a.name, month
)
SELECT name, month, cents, SUM(cents) OVER (PARTITION BY name ORDER BY month) AS running
FROM monthly
ORDER BY name, month;
