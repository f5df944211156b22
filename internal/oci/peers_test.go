package oci

import (
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"

	"github.com/autonomyops/autonomy/internal/testutil"
)

// memory starts go-containerregistry's registry, which gives the configuration's
// media type as artifact type and shares blobs between repositories.
func memory(t testing.TB, referrersAPI bool) string {
	t.Helper()
	srv := httptest.NewServer(ggcr.New(ggcr.WithReferrersSupport(referrersAPI), ggcr.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// registries runs a test against each peer: a real registry without the
// referrers API, one in memory with it, one without.
func registries(t *testing.T, f func(t *testing.T, host string)) {
	t.Run("docker-registry", func(t *testing.T) { f(t, testutil.StartRegistry(t).Addr) })
	t.Run("referrers API", func(t *testing.T) { f(t, memory(t, true)) })
	t.Run("fallback tag", func(t *testing.T) { f(t, memory(t, false)) })
}
