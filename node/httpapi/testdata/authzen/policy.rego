# The policies of two published AuthZEN scenarios: the Todo application of the
# interoperability events, and the fixture of the certification scenario.
package autonomy

import rego.v2

default decision := {"allow": false, "reasons": [{"code": "denied", "message": "the scenario does not allow this"}]}

decision := {"allow": true} if {
	input.kind == "access.evaluation"
	allowed
}

subject := input.params.subject

action := input.params.action

resource := input.params.resource

# Todo: subjects come by their PID in the later drafts, by their address in the first.
users := {
	"rick@the-citadel.com": {"pid": "CiRmZDA2MTRkMy1jMzlhLTQ3ODEtYjdiZC04Yjk2ZjVhNTEwMGQSBWxvY2Fs", "roles": {"admin", "evil_genius"}},
	"morty@the-citadel.com": {"pid": "CiRmZDE2MTRkMy1jMzlhLTQ3ODEtYjdiZC04Yjk2ZjVhNTEwMGQSBWxvY2Fs", "roles": {"editor"}},
	"summer@the-smiths.com": {"pid": "CiRmZDI2MTRkMy1jMzlhLTQ3ODEtYjdiZC04Yjk2ZjVhNTEwMGQSBWxvY2Fs", "roles": {"editor"}},
	"beth@the-smiths.com": {"pid": "CiRmZDM2MTRkMy1jMzlhLTQ3ODEtYjdiZC04Yjk2ZjVhNTEwMGQSBWxvY2Fs", "roles": {"viewer"}},
	"jerry@the-smiths.com": {"pid": "CiRmZDQ2MTRkMy1jMzlhLTQ3ODEtYjdiZC04Yjk2ZjVhNTEwMGQSBWxvY2Fs", "roles": {"viewer"}},
}

address := subject.id if users[subject.id]

address := a if {
	some a, user in users
	user.pid == subject.id
}

roles := users[address].roles

owner := resource.properties.ownerID

owner := resource.ownerID # as the first draft has it

allowed if {
	action.name in {"can_read_user", "can_read_todos"}
	address
}

allowed if {
	action.name == "can_create_todo"
	some role in {"admin", "editor"}
	role in roles
}

allowed if {
	action.name == "can_update_todo"
	"evil_genius" in roles
}

allowed if {
	action.name == "can_delete_todo"
	"admin" in roles
}

allowed if {
	action.name in {"can_update_todo", "can_delete_todo"}
	"editor" in roles
	owner == address
}

# Certification: alice and bob, record-1 and record-2.
record if {
	subject.type == "user"
	resource.type == "record"
}

archived if resource.properties.status == "archived"

allowed if {
	record
	subject.id in {"alice", "bob"}
	action.name == "read"
}

allowed if {
	record
	subject.id == "alice"
	action.name == "write"
	not archived
}

allowed if {
	record
	subject.properties.role == "admin"
	action.name == "write"
	archived
}

allowed if {
	record
	subject.id == "alice"
	action.name == "delete"
	action.properties.soft == true
}
