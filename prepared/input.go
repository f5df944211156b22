package prepared

import (
	"context"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/autonomyops/autonomy/prepared/irvm"
)

// MaxInputBytes is the size of the largest input that Eval takes. The node's
// body limit (256 KiB by default) is below it.
const MaxInputBytes = 1 << 20

// reader reads inputs where no program is at hand.
var reader = irvm.Empty(irvm.Limits{})

// parseInput reads an input into OPA's value, as strictly as Eval does.
func parseInput(data []byte) (ast.Value, error) {
	m := reader.Machine(context.Background())
	defer m.Release()
	v, err := m.Parse(data)
	if err != nil {
		return nil, err
	}
	return v.AST(), nil
}
