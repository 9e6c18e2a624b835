{{- define "lt.modelsPod" -}}
metadata:
  labels: {{ include "lt.selector" (list . "models") }}
spec:
  restartPolicy: OnFailure
  automountServiceAccountToken: false
  enableServiceLinks: false
  serviceAccountName: {{ include "lt.engine" . }}
  securityContext:
    {{- include "lt.podSecurity" . | nindent 4 }}
  {{- include "lt.pullSecrets" . | nindent 2 }}
  {{- with .Values.modelCache.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.modelCache.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: download
      image: {{ include "lt.image" (list . .Values.image) | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [sh, -ec]
      args:
        - |
          [ -f "$TARGET/.complete" ] && exit 0
          # Meta's repositories hold their weights twice.
          hf download "$MODEL" --revision "$REVISION" --local-dir "$TARGET" --exclude 'original/*'
          touch "$TARGET/.complete"
      env:
        - name: MODEL
          value: {{ .Values.model.name | quote }}
        - name: REVISION
          value: {{ .Values.model.revision | quote }}
        - name: TARGET
          value: {{ include "lt.modelPath" . | quote }}
        - name: HOME
          value: /tmp
        {{- if .Values.model.tokenSecret.name }}
        {{- include "lt.secretEnv" (list "HF_TOKEN" .Values.model.tokenSecret) | nindent 8 }}
        {{- end }}
        {{- with .Values.modelCache.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        requests: {cpu: "2", memory: {{ .Values.modelCache.downloadMemory | quote }}}
        limits: {cpu: "2", memory: {{ .Values.modelCache.downloadMemory | quote }}}
      securityContext:
        {{- include "lt.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - name: models
          mountPath: /models
        - name: tmp
          mountPath: /tmp
        {{- with .Values.modelCache.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: models
      persistentVolumeClaim:
        claimName: {{ include "lt.claim" . | quote }}
    - name: tmp
      emptyDir: {sizeLimit: 4Gi}
    {{- with .Values.modelCache.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- /* A Job cannot be changed: another pod is another Job. */ -}}
{{- define "lt.modelsJob" -}}
{{ include "lt.name" . }}-models-{{ sha256sum (include "lt.modelsPod" .) | trunc 8 }}
{{- end }}

{{- define "lt.modelsSpec" -}}
backoffLimit: 6
activeDeadlineSeconds: 21600
template:
  {{- include "lt.modelsPod" . | nindent 2 }}
{{- end }}
