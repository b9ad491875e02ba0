"""Functions with which workers create and drop partitions, although their role may not change tables."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# A later migration adds a table with CREATE OR REPLACE VIEW headrace.partitioned. A view and not a table: nothing but a
# migration can change it. Each table has a default partition called `<parent>_other`.
VIEWS = """
-- `key` is the column of the partition key, `unit` the length of a partition, `ahead` the number of partitions that are
-- created before their time. Partitions are called `<parent>_YYYYMM` or `<parent>_YYYYMMDD`.
CREATE OR REPLACE VIEW headrace.partitioned (parent, key, unit, ahead) AS
VALUES ('archive', 'received_at', 'day', 7), ('samples', 'ts', 'month', 2);

-- All partitions except the default ones: rows with first <= key < last. Reads the bounds in the session's time zone,
-- which must be UTC.
CREATE OR REPLACE VIEW headrace.partitions (parent, name, first, last) AS
SELECT p.relname, c.relname, coalesce(CAST(bounds[2] AS timestamptz), '-infinity'),
       coalesce(CAST(bounds[4] AS timestamptz), 'infinity')
FROM pg_inherits JOIN pg_class p ON p.oid = inhparent JOIN pg_class c ON c.oid = inhrelid,
LATERAL regexp_match(pg_get_expr(c.relpartbound, c.oid),
    $$FROM \\((MINVALUE|'([^']+)')\\) TO \\((MAXVALUE|'([^']+)')\\)$$) AS bounds
WHERE p.relnamespace = 'headrace'::regnamespace AND p.relkind = 'p' AND bounds IS NOT NULL;
"""
# The owner's rights apply inside, so every name in the statements comes from the catalog or from the view above. The
# writer gets no new power over data: it may delete every row that these functions can drop.
#
# A new partition is a table that is attached. CREATE TABLE ... PARTITION OF would lock the parent in ACCESS EXCLUSIVE
# mode; ATTACH PARTITION locks it in SHARE UPDATE EXCLUSIVE mode, in which everybody can read and write, and only the
# default partition in ACCESS EXCLUSIVE mode. Statements queue behind a lock that waits, so it waits for 100 ms at most
# (SQLSTATE 55P03), and the caller repeats it.
FUNCTIONS = """
CREATE OR REPLACE FUNCTION headrace.create_partition(parent_name text, moment timestamptz) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO' SET lock_timeout = '100ms' AS $$
DECLARE
    parent record;
    start timestamptz;
    stop timestamptz;
    name text;
    rows bigint;
BEGIN
    SELECT p.* INTO STRICT parent FROM headrace.partitioned p WHERE p.parent = parent_name;
    start := date_trunc(parent.unit, moment);
    stop := start + CAST('1 ' || parent.unit AS interval);
    name := format('%s_%s', parent_name, to_char(start, CASE parent.unit WHEN 'day' THEN 'YYYYMMDD' ELSE 'YYYYMM' END));
    PERFORM pg_advisory_xact_lock(hashtext('headrace.partitions'));
    IF EXISTS (SELECT FROM headrace.partitions p
               WHERE p.parent = parent_name AND p.first <= moment AND moment < p.last) THEN
        RETURN true;
    END IF;
    -- Implausible times stay in the default partition: a wrong clock must not create a table. A table of this name that
    -- is not a partition is being filled by `headrace migrate --convert`.
    IF moment < '2000-01-01' OR start > now() + (parent.ahead * CAST('1 ' || parent.unit AS interval))
       OR to_regclass(format('headrace.%I', name)) IS NOT NULL THEN
        RETURN false;
    END IF;
    -- Rows of the new partition that are in the default one are moved. More of them would hold the lock for longer than
    -- workers wait; `headrace migrate --convert` moves them without it.
    EXECUTE format('SELECT count(*) FROM (SELECT FROM headrace.%I WHERE %I >= $1 AND %I < $2 LIMIT 50001) AS present',
                   parent_name || '_other', parent.key, parent.key) INTO rows USING start, stop;
    IF rows > 50000 THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE headrace.%I (LIKE headrace.%I INCLUDING ALL)', name, parent_name);
    EXECUTE format('LOCK TABLE headrace.%I IN ACCESS EXCLUSIVE MODE', parent_name || '_other');
    EXECUTE format('WITH moved AS (DELETE FROM headrace.%I WHERE %I >= $1 AND %I < $2 RETURNING *)
                    INSERT INTO headrace.%I SELECT * FROM moved',
                   parent_name || '_other', parent.key, parent.key, name) USING start, stop;
    EXECUTE format('ALTER TABLE headrace.%I ATTACH PARTITION headrace.%I FOR VALUES FROM (%L) TO (%L)',
                   parent_name, name, start, stop);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION headrace.drop_partition(parent_name text, partition_name text, only_empty boolean)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO' SET lock_timeout = '100ms' AS $$
DECLARE
    part regclass;
    has_rows boolean;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('headrace.partitions'));
    IF NOT EXISTS (SELECT FROM headrace.partitioned p JOIN headrace.partitions c USING (parent)
                   WHERE p.parent = parent_name AND c.name = partition_name) THEN
        RETURN false;
    END IF;
    part := format('headrace.%I', partition_name)::regclass;
    -- A partition that `headrace migrate --convert` copies stays until it is converted. VACUUM truncates the file of an
    -- empty partition; reading a large file of deleted rows would hold the lock for too long.
    IF EXISTS (SELECT FROM pg_trigger WHERE tgrelid = part AND tgname = 'mirror')
       OR only_empty AND pg_relation_size(part) > 1048576 THEN
        RETURN false;
    END IF;
    EXECUTE format('LOCK TABLE headrace.%I IN ACCESS EXCLUSIVE MODE', parent_name);
    IF only_empty THEN
        EXECUTE format('SELECT EXISTS (SELECT FROM %s)', part) INTO has_rows;
        IF has_rows THEN
            RETURN false;
        END IF;
    END IF;
    EXECUTE format('DROP TABLE %s', part);
    RETURN true;
END $$;
"""
# `headrace roles` grants the same to new roles.
GRANTS = """
DO $$ DECLARE one record; BEGIN
    REVOKE ALL ON FUNCTION headrace.create_partition, headrace.drop_partition FROM PUBLIC;
    FOR one IN SELECT DISTINCT grantee::regrole AS role FROM pg_class, aclexplode(relacl)
        WHERE oid = 'headrace.samples'::regclass AND privilege_type = 'DELETE' AND grantee NOT IN (0, relowner)
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION headrace.create_partition, headrace.drop_partition TO %s', one.role);
        EXECUTE format('GRANT SELECT ON headrace.partitioned, headrace.partitions TO %s', one.role);
    END LOOP;
END $$;
"""


def upgrade() -> None:
    op.execute(VIEWS)
    op.execute(FUNCTIONS)
    op.execute(GRANTS)
