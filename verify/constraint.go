package verify

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/Masterminds/semver/v3"
)

// maxConstraints bounds one list of runtime constraints.
const maxConstraints = 16

// One token: an operator and a version. Alternatives, commas, ranges with a
// hyphen and wildcards are refused, so that there is one way to read a list.
var reConstraint = regexp.MustCompile(`^(?:=|!=|>|>=|<|<=|~|\^)?v?(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*)){0,2}(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?$`)

func parseConstraints(list string) ([]*semver.Constraints, error) {
	fields := strings.Fields(list)
	if len(fields) > maxConstraints {
		return nil, fmt.Errorf("%d constraints, the limit is %d", len(fields), maxConstraints)
	}
	out := make([]*semver.Constraints, len(fields))
	for i, f := range fields {
		if len(f) > 128 || !reConstraint.MatchString(f) {
			return nil, fmt.Errorf("constraint %q: want an operator (= != > >= < <= ~ ^) and a version, as in >=1.2.0", clip(f))
		}
		c, err := semver.NewConstraint(f)
		if err != nil {
			return nil, fmt.Errorf("constraint %q: %w", clip(f), err)
		}
		c.IncludePrerelease = true // order by precedence alone: 1.3.0-rc.1 is above 1.2.0 and below 1.3.0
		out[i] = c
	}
	return out, nil
}

// CheckRuntime returns nil when version (semver, a leading v allowed) satisfies
// every one of the space-separated constraints. An empty list is satisfied by
// any version. A pre-release counts by precedence: 1.3.0-rc.1 satisfies >=1.2.0
// and not >=1.3.0.
func CheckRuntime(constraints, version string) error {
	list, err := parseConstraints(constraints)
	if err != nil {
		return err
	}
	v, err := semver.StrictNewVersion(strings.TrimPrefix(version, "v"))
	if err != nil {
		return fmt.Errorf("runtime version %q: %w", clip(version), err)
	}
	for i, c := range list {
		if !c.Check(v) {
			return fmt.Errorf("runtime %s does not satisfy %s", v, strings.Fields(constraints)[i])
		}
	}
	return nil
}
