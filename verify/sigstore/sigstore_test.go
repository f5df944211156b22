package sigstore

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/autonomyops/autonomy/verify"
)

func wantCode(t *testing.T, v *Verifier, digest string, bundles [][]byte, at time.Time, code string) {
	t.Helper()
	id, err := v.VerifyArtifact(context.Background(), digest, bundles, at)
	var fault *verify.Error
	if !errors.As(err, &fault) || fault.Code != code || id != "" {
		t.Errorf("VerifyArtifact = %q, %v; want %s", id, err, code)
	}
}
