# What may leave the house: messages and their files, and what is asked of the
# databases for them.
package autonomy

import rego.v2

decision := {
	"allow": allow,
	"reasons": [{"code": code, "message": text} | some code, text in problems],
	"constraints": {"timeout_ms": limits.timeout_ms, "output_max_bytes": limits.bytes},
}

default allow := false

allow if {
	sender
	channel
	count(problems) == 0
}

channel := data.channels[input.kind]

sender := data.senders[input.agent.id]

unit := data.units[sender.unit]

default limits := {"timeout_ms": 1000, "bytes": 4096}

limits := {"timeout_ms": channel.timeout_ms, "bytes": min({channel.bytes, unit.bytes})}

problems["sender"] := "nobody knows this agent" if not sender

problems["channel"] := "there is no such channel" if not channel

problems["level"] := $"needs level {channel.level}" if not sender.level >= channel.level

problems["network"] := "asked from outside the house" if not at_home

at_home if {
	some range in unit.networks
	net.cidr_contains(range, input.caller.address)
}

# Recipients: not too many, and all in domains of the unit or of its partners.
problems["recipients"] := "too many recipients" if not count(input.params.to) <= channel.max_to

problems["domains"] := concat(", ", strangers) if count(strangers) > 0

strangers := {domain |
	some address in input.params.to
	domain := lower(substring(address, indexof(address, "@") + 1, -1))
	not domain_known(domain)
}

domain_known(domain) if domain in unit.domains

domain_known(domain) if {
	some pattern in unit.partners
	glob.match(pattern, ["."], domain)
}

# Files: of the channel's types, and together within its size.
problems["types"] := "a file of another type" if {
	some name in object.keys(object.get(input.params, "files", {}))
	not regex.replace(lower(name), `^.*\.`, "") in channel.types
}

problems["size"] := "files are too large" if sum([size | some size in input.params.files]) > limits.bytes

# Tables: those of the unit.
problems["tables"] := $"not of this unit: {count(foreign)}" if count(foreign) > 0

foreign := {table | some table in input.params.tables} - {table | some table in unit.tables}

# Hours: those of the channel, but for who is always on duty.
problems["hours"] := "out of hours" if {
	not sender.always
	not in_hours
}

in_hours if {
	[hour, _, _] := time.clock([input.time_ns, "UTC"])
	hour >= channel.hours[0]
	hour < channel.hours[1]
}

problems["words"] := word if {
	subject := lower(input.params.subject)
	word := min({w | some w in data.words; contains(subject, w)})
}
