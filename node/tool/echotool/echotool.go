// Package echotool is tool.echo: it answers with the params it was given, byte
// for byte. It has no effect outside, so it is the tool to try a policy, a
// caller or a load with.
package echotool

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"github.com/autonomyops/autonomy/node/tool/executor"
)

// Schema takes any object.
var Schema = json.RawMessage(`{"type":"object"}`)

// Description is the tool's description for the agent.
const Description = "Answer with the params as they are. No effect outside."

// CodeTooLarge: the params are larger than the output may be.
const CodeTooLarge = "output_too_large"

// Tool is the executor.
type Tool struct{}

// Execute returns a copy of the params.
func (Tool) Execute(_ context.Context, r *executor.Request) executor.Result {
	limit := int64(executor.MaxOutput)
	if n := r.Constraints.OutputMaxBytes; n > 0 {
		limit = min(limit, n)
	}
	if int64(len(r.Params)) > limit {
		return executor.Fail(CodeTooLarge, fmt.Sprintf("the params have %d bytes, the output may have %d", len(r.Params), limit))
	}
	return executor.Result{Outcome: executor.OK, Output: bytes.Clone(bytes.TrimSpace(r.Params))}
}
