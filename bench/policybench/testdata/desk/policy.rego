# What the agents of a service desk may do. A call is allowed when its desk and
# its tool are known and nothing speaks against it.
package autonomy

import rego.v2

decision := {"allow": allow, "reasons": reasons, "constraints": constraints, "redact": redact}

default allow := false

allow if {
	desk
	tool
	count(reasons) == 0
}

desk := data.desks[input.node.labels.desk]

tool := data.tools[input.kind]

grant := desk.grants[input.kind]

reasons contains "desk_unknown" if not desk

reasons contains "tool_unknown" if not tool

reasons contains "not_granted" if {
	desk
	not grant
}

reasons contains "site_closed" if data.sites[input.node.labels.site].closed

reasons contains "risk" if tool.risk > desk.risk_ceiling

reasons contains $"label_missing: {name}" if {
	some name in tool.labels
	not input.node.labels[name]
}

# Files: below a granted directory, without a step up.
reasons contains "path" if {
	tool.family == "file"
	not path_granted(input.params.path)
}

path_granted(path) if {
	not contains(path, "..")
	some dir in grant.dirs
	startswith(path, dir)
}

# Web: https, to a granted host or one below a granted domain.
reasons contains "scheme" if {
	tool.family == "web"
	not startswith(input.params.endpoint, "https://")
}

reasons contains "host" if {
	tool.family == "web"
	not host_granted(host)
}

host := lower(split(split(input.params.endpoint, "/")[2], ":")[0])

host_granted(name) if name in grant.hosts

host_granted(name) if {
	some domain in grant.domains
	endswith(name, domain)
}

# Refunds: within the limit of a call, and of what is left in the purse.
reasons contains "amount" if {
	tool.family == "refund"
	not input.params.cents <= grant.max_cents
}

reasons contains "purse" if left < 0

default left := 0

left := data.purses[desk.purse].cents - (input.params.cents + tool.fee)

# Nothing that looks like a credential leaves in a parameter.
reasons contains "credential" if {
	some value in input.params
	is_string(value)
	regex.match(`(?:AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----)`, value)
}

default constraints := {}

constraints := {"timeout_ms": timeout, "output_max_bytes": tool.max_output}

timeout := 30000 if {
	tool.risk <= 2
	input.node.assurance == "full"
} else := 10000 if {
	tool.risk <= 6
} else := 3000

redact contains pointer if some pointer in tool.redact

redact contains "/params/note" if {
	tool.risk >= desk.redact_from
	not input.node.labels.verbatim
}
