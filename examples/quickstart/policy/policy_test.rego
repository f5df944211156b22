# Tests of the quickstart policy: what it allows, what it denies, and with which
# reason. Run them with
#
#	autonomy policy test examples/quickstart/policy
package autonomy_test

import rego.v2

import data.autonomy

# ---- allowed -----------------------------------------------------------------

test_echo_is_allowed if {
	answer := autonomy.decision with input as {"kind": "tool.echo", "params": {"message": "hello"}}
	answer == {"allow": true, "reasons": set(), "constraints": {}}
}

test_listed_programs_are_allowed_within_limits if {
	every kind in ["tool.exec.date_utc", "tool.exec.word_count"] {
		answer := autonomy.decision with input as {"kind": kind, "params": {}}
		answer.allow == true
		answer.constraints == {"timeout_ms": 5000, "output_max_bytes": 65536}
	}
}

test_listed_hosts_are_allowed if {
	every endpoint in [
		"https://example.org",
		"https://EXAMPLE.org/index.html?q=1",
		"http://127.0.0.1:8080/health",
		"http://localhost:5080/",
		"http://localhost/",
	] {
		get(endpoint).allow == true
	}
}

test_reading_a_file_is_allowed if {
	autonomy.decision.allow == true with input as {"kind": "tool.fs.read", "params": {"path": "notes.txt"}}
}

# ---- denied, and why ---------------------------------------------------------

test_shell_is_denied if {
	codes({"kind": "tool.shell", "params": {"command": "id"}}) == {"shell_denied"}
}

test_writing_a_file_is_denied if {
	codes({"kind": "tool.fs.write", "params": {"path": "a", "content": "b"}}) == {"read_only"}
}

test_other_programs_are_denied if {
	codes({"kind": "tool.exec.rm", "params": {}}) == {"program_not_listed"}
}

test_other_tools_are_denied if {
	codes({"kind": "tool.http_request", "params": {"endpoint": "https://example.org/"}}) == {"tool_not_allowed"}
}

test_other_hosts_are_denied_by_name if {
	answer := get("https://evil.test/steal")
	answer.allow == false
	answer.reasons == {{"code": "host_not_listed", "message": "evil.test is not in data.allowed.hosts"}}
}

test_another_port_of_a_listed_host_is_denied if {
	answer := get("https://example.org:8443/")
	answer.allow == false
	answer.reasons == {{"code": "host_not_listed", "message": "example.org:8443 is not in data.allowed.hosts"}}
}

test_addresses_that_hide_their_host_are_denied if {
	every endpoint in [
		"https://example.org@evil.test/",
		"https://example.org:x@evil.test/",
		"https://example.org\\.evil.test/",
		"https://example.org\n.evil.test/",
		"file:///etc/passwd",
		"//example.org/",
		"",
		17,
		null,
	] {
		codes({"kind": "tool.http_get", "params": {"endpoint": endpoint}}) == {"endpoint_invalid"}
	}
}

test_a_suffix_of_a_listed_host_is_not_the_host if {
	get("https://example.org.evil.test/").allow == false
	get("https://notexample.org/").allow == false
}

# ---- nothing is switched off by leaving a field out --------------------------

test_incomplete_calls_are_denied_with_a_reason if {
	every call in [
		{},
		{"kind": null},
		{"kind": 7},
		{"params": {"endpoint": "https://example.org/"}},
		{"kind": "tool.http_get"},
		{"kind": "tool.http_get", "params": {}},
		{"kind": "tool.http_get", "params": "https://example.org/"},
	] {
		count(codes(call)) > 0
	}
}

# ---- helpers -----------------------------------------------------------------

get(endpoint) := answer if {
	answer := autonomy.decision with input as {"kind": "tool.http_get", "params": {"endpoint": endpoint}}
}

# The codes of a denied call; undefined, so that the test fails, for an allowed one.
codes(call) := {reason.code | some reason in answer.reasons} if {
	answer := autonomy.decision with input as call
	answer.allow == false
}
