# The policy of the quickstart: what may an agent on this machine do?
#
# The node asks for `data.autonomy.decision` before every tool call. It hands
# over the call as `input`, for example
#
#	{
#	  "kind":    "tool.http_get",
#	  "params":  {"endpoint": "https://example.org/"},
#	  "session": "s-1",
#	  "caller":  {"type": "anonymous"},
#	  "agent":   {"id": "demo", "release": "r-1", "fingerprint": "blake3:..."},
#	  "node":    {"id": "n-1", "labels": {}, "assurance": "reduced"},
#	  "time_ns": 1767225600000000000
#	}
#
# and does what the answer says. No answer, or an answer it does not understand
# in full, is a deny.
#
# Lists that change often are not here but in data.json, as `data.allowed`.
#
#	autonomy policy test  examples/quickstart/policy
#	autonomy policy build examples/quickstart/policy --version 1.0.0 --out policy.tar.gz
package autonomy

# With rego.v2, `not` holds when anything below it is undefined. So a field that
# the caller leaves out cannot switch a rule off.
import rego.v2

# The answer: one document, so that the three parts always belong together.
decision := {
	"allow": allow,
	"reasons": reasons,
	"constraints": constraints,
}

# ---- What is allowed ---------------------------------------------------------
# Each rule permits one kind of call. Whatever no rule permits is denied: the
# list of bad things is never complete, the list of good things can be.

default allow := false

# Says back what it is told. Touches nothing.
allow if input.kind == "tool.echo"

# Runs a program that the node's operator has set up, on data.json's list.
allow if program_listed

# Fetches a page from a host on data.json's list.
allow if {
	input.kind == "tool.http_get"
	host_listed
}

# Reads a file. The tool itself cannot leave its directory.
allow if input.kind == "tool.fs.read"

program_listed if input.kind in data.allowed.programs

# ---- Hosts -------------------------------------------------------------------
# "example.org" in the list means its default port, "localhost:*" any port.

host_listed if {
	url.port == ""
	url.host in data.allowed.hosts
}

host_listed if {
	any_port := concat("", [url.host, ":*"])
	any_port in data.allowed.hosts
}

# The endpoint taken apart. It is undefined for anything but a plain http(s)
# address, so https://example.org@evil.test/ has no host and is on no list.
url := {"host": lower(parts[1]), "port": parts[2]} if {
	is_string(input.params.endpoint)
	pattern := `^https?://([A-Za-z0-9.-]+)(:[0-9]{1,5})?(?:[/?#].*)?$`
	some parts in regex.find_all_string_submatch_n(pattern, input.params.endpoint, 1)
}

# ---- Why not -----------------------------------------------------------------
# Reasons explain a deny to the agent and to whoever reads the record. They
# decide nothing: allow, above, stands alone.

reasons contains {"code": "shell_denied", "message": message} if {
	kind == "tool.shell"
	message := "a shell can do anything; ask for a tool.exec program that does this one thing"
}

reasons contains {"code": "read_only", "message": message} if {
	kind == "tool.fs.write"
	message := "this policy lets files be read, not written"
}

reasons contains {"code": "program_not_listed", "message": message} if {
	startswith(kind, "tool.exec.")
	not program_listed
	message := $"{kind} is not in data.allowed.programs"
}

reasons contains {"code": "host_not_listed", "message": message} if {
	kind == "tool.http_get"
	url
	not host_listed
	message := $"{url.host}{url.port} is not in data.allowed.hosts"
}

reasons contains {"code": "endpoint_invalid", "message": message} if {
	kind == "tool.http_get"
	not url
	message := "params.endpoint must be a plain http:// or https:// address"
}

reasons contains {"code": "tool_not_allowed", "message": message} if {
	not kind in {"tool.echo", "tool.fs.read", "tool.fs.write", "tool.http_get", "tool.shell"}
	not startswith(kind, "tool.exec.")
	message := $"{kind} is not a tool that this policy allows"
}

# For messages only: a call without a kind still gets a reason.
default kind := "a call without a kind"

kind := input.kind if is_string(input.kind)

# ---- Within which limits -----------------------------------------------------
# Limits can only narrow what the node's tools.yaml allows.

default constraints := {}

constraints := {"timeout_ms": 5000, "output_max_bytes": 65536} if program_listed
